/* Answers requests to SavedModels through TensorFlow's C API: the C++ loader that TensorFlow Serving uses, no Python.

     load_saved_model FOLDER... <requests >answers

   Requests are words between white space. Each is the number of its model among the folders, from 0, the numbers of
   feeds and of fetches, the feeds, and the names of the fetches. A feed is a name, such as serving_default_images:0, a
   TF_DataType, the rank, the dimensions and the values; a string is "x" and two hexadecimal digits for each byte. A line
   answers each request: "error CODE MESSAGE", or "answer" and for each fetch what a feed has after its name. Each model
   is loaded once. */

#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tensorflow/c/c_api.h"

enum { MAX_MODELS = 16, MAX_TENSORS = 16, MAX_RANK = 8, MAX_NAME = 256 };

static void fail(const char* message) {
  fprintf(stderr, "load_saved_model: %s\n", message);
  exit(1);
}

static void* allocate(size_t size) {
  void* memory = malloc(size ? size : 1);
  if (memory == NULL) fail("out of memory");
  return memory;
}

static int64_t read_integer(int64_t smallest, int64_t largest) {
  int64_t value;
  if (scanf("%" SCNd64, &value) != 1 || value < smallest || value > largest) fail("a number is missing or not allowed");
  return value;
}

static int read_digit(void) {
  static const char digits[] = "0123456789abcdef";
  int letter = getchar();
  const char* place = letter > 0 ? strchr(digits, letter) : NULL;
  return place == NULL ? -1 : (int)(place - digits);
}

static void read_string(TF_TString* string) {
  size_t size = 0, capacity = 1 << 16;
  char* bytes = allocate(capacity);
  if (scanf(" %1[x]", bytes) != 1) fail("a string is missing");
  for (int high = read_digit(); high >= 0; high = read_digit()) {
    int low = read_digit();
    if (low < 0) fail("a string has half a byte");
    if (size == capacity && (bytes = realloc(bytes, capacity *= 2)) == NULL) fail("out of memory");
    bytes[size++] = (char)(16 * high + low);
  }
  TF_StringInit(string);
  TF_StringCopy(string, bytes, size);
  free(bytes);
}

static TF_Tensor* read_tensor(void) {
  TF_DataType dtype = (TF_DataType)read_integer(1, 100);
  int rank = (int)read_integer(0, MAX_RANK);
  int64_t dimensions[MAX_RANK], count = 1;
  for (int axis = 0; axis < rank; ++axis) count *= dimensions[axis] = read_integer(0, 1 << 20);
  size_t width = dtype == TF_STRING ? sizeof(TF_TString) : TF_DataTypeSize(dtype);
  TF_Tensor* tensor = TF_AllocateTensor(dtype, dimensions, rank, (size_t)count * width);
  if (tensor == NULL) fail("a feed could not be allocated");
  void* data = TF_TensorData(tensor);
  for (int64_t i = 0; i < count; ++i) {
    float value;
    if (dtype == TF_FLOAT && scanf("%f", &value) == 1) {
      ((float*)data)[i] = value;
    } else if (dtype == TF_INT32) {
      ((int32_t*)data)[i] = (int32_t)read_integer(INT32_MIN, INT32_MAX);
    } else if (dtype == TF_UINT8) {
      ((uint8_t*)data)[i] = (uint8_t)read_integer(0, UINT8_MAX);
    } else if (dtype == TF_STRING) {
      read_string((TF_TString*)data + i);
    } else {
      fail("a feed is float32, int32, uint8 or string");
    }
  }
  return tensor;
}

static void delete_tensor(TF_Tensor* tensor) {
  if (TF_TensorType(tensor) == TF_STRING) {
    TF_TString* strings = TF_TensorData(tensor);
    for (int64_t i = 0; i < TF_TensorElementCount(tensor); ++i) TF_StringDealloc(strings + i);
  }
  TF_DeleteTensor(tensor);
}

static void write_tensor(const TF_Tensor* tensor) {
  TF_DataType dtype = TF_TensorType(tensor);
  printf(" %d %d", (int)dtype, TF_NumDims(tensor));
  for (int axis = 0; axis < TF_NumDims(tensor); ++axis) printf(" %" PRId64, TF_Dim(tensor, axis));
  const void* data = TF_TensorData(tensor);
  for (int64_t i = 0; i < TF_TensorElementCount(tensor); ++i) {
    if (dtype == TF_FLOAT) {
      printf(" %.9g", ((const float*)data)[i]);
    } else if (dtype == TF_INT32) {
      printf(" %" PRId32, ((const int32_t*)data)[i]);
    } else if (dtype == TF_INT64) {
      printf(" %" PRId64, ((const int64_t*)data)[i]);
    } else if (dtype == TF_UINT8) {
      printf(" %u", ((const uint8_t*)data)[i]);
    } else if (dtype == TF_STRING) {
      const TF_TString* string = (const TF_TString*)data + i;
      const char* bytes = TF_StringGetDataPointer(string);
      printf(" x");
      for (size_t j = 0; j < TF_StringGetSize(string); ++j) printf("%02x", (unsigned char)bytes[j]);
    } else {
      fail("a fetch is float32, int32, int64, uint8 or string");
    }
  }
}

static TF_Output read_output(TF_Graph* graph) {
  char name[MAX_NAME + 1];
  if (scanf("%256s", name) != 1) fail("the name of a tensor is missing");
  char* colon = strrchr(name, ':');
  if (colon == NULL) fail("a tensor is named OPERATION:INDEX");
  *colon = '\0';
  TF_Output output = {TF_GraphOperationByName(graph, name), atoi(colon + 1)};
  if (output.oper == NULL) fail("the graph has no operation of that name");
  return output;
}

typedef struct {
  TF_Graph* graph;
  TF_Session* session;
} Model;

static Model load(const char* folder, TF_Status* status) {
  const char* const tags[] = {"serve"};
  TF_SessionOptions* options = TF_NewSessionOptions();
  Model model = {TF_NewGraph(), NULL};
  model.session = TF_LoadSessionFromSavedModel(options, NULL, folder, tags, 1, model.graph, NULL, status);
  if (TF_GetCode(status) != TF_OK) fail(TF_Message(status));
  TF_DeleteSessionOptions(options);
  return model;
}

static void answer(Model model, TF_Status* status) {
  TF_Output feeds[MAX_TENSORS], fetches[MAX_TENSORS];
  TF_Tensor *values[MAX_TENSORS], *results[MAX_TENSORS] = {NULL};
  int num_feeds = (int)read_integer(1, MAX_TENSORS);
  int num_fetches = (int)read_integer(1, MAX_TENSORS);
  for (int i = 0; i < num_feeds; ++i) {
    feeds[i] = read_output(model.graph);
    values[i] = read_tensor();
  }
  for (int i = 0; i < num_fetches; ++i) fetches[i] = read_output(model.graph);
  TF_SessionRun(model.session, NULL, feeds, values, num_feeds, fetches, results, num_fetches, NULL, 0, NULL, status);
  if (TF_GetCode(status) == TF_OK) {
    printf("answer");
    for (int i = 0; i < num_fetches; ++i) {
      write_tensor(results[i]);
      delete_tensor(results[i]);
    }
  } else {
    printf("error %d ", (int)TF_GetCode(status));
    for (const char* letter = TF_Message(status); *letter; ++letter) putchar(*letter == '\n' ? ' ' : *letter);
  }
  printf("\n");
  for (int i = 0; i < num_feeds; ++i) delete_tensor(values[i]);
}

int main(int argc, char** argv) {
  int num_models = argc - 1, number;
  if (num_models < 1 || num_models > MAX_MODELS) fail("usage: load_saved_model FOLDER... <requests >answers");
  Model models[MAX_MODELS];
  TF_Status* status = TF_NewStatus();
  for (int i = 0; i < num_models; ++i) models[i] = load(argv[i + 1], status);
  while (scanf("%d", &number) == 1) {
    if (number < 0 || number >= num_models) fail("there is no model of that number");
    answer(models[number], status);
  }
  if (!feof(stdin)) fail("the number of a model is missing");
  for (int i = 0; i < num_models; ++i) {
    TF_DeleteSession(models[i].session, status);
    TF_DeleteGraph(models[i].graph);
  }
  TF_DeleteStatus(status);
  return 0;
}
