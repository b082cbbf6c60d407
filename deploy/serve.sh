#!/usr/bin/env bash
#
# Serves exported models with TensorFlow Serving in Docker, until Ctrl-C.
#
#   deploy/serve.sh models/digits                        # a folder that scripts/export.py wrote
#   deploy/serve.sh models/digits models/cifar10         # several; models.config has to name each
#   deploy/serve.sh models/digits -- --rest_api_num_threads=8      # further flags of the server
#
# IMAGE      which server; default tensorflow/serving:2.21.0, with -gpu for CUDA devices (and DOCKER_ARGS="--gpus=all")
# CONFIG     folder of models.config, batching.config and monitoring.config; default: this script's
# ADDRESS    which address of this machine answers; default 127.0.0.1, since the server asks nobody who they are
# GRPC_PORT, REST_PORT    default 8500 and 8501
# DOCKER_ARGS    further arguments of `docker run`, separated by spaces

set -euo pipefail
unset CDPATH # with it, cd may go elsewhere, and prints where

fail() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit "${2:-1}"
}

image=${IMAGE:-tensorflow/serving:2.21.0}
config=${CONFIG:-$(dirname -- "${BASH_SOURCE[0]}")}
address=${ADDRESS:-127.0.0.1}
read -r -a docker_arguments <<< "${DOCKER_ARGS:-}"

for name in models batching monitoring; do
  [[ -r $config/$name.config ]] || fail "There is no $name.config in the folder $config. Name its folder with CONFIG=."
done
config=$(cd -- "$config" && pwd)

shopt -s extglob
offered=$(grep -v '^ *#' "$config/models.config") || true
offered=${offered// /}

folders=()
while (($# > 0)) && [[ $1 != -- ]]; do
  folders+=("$1")
  shift
done
if (($# > 0)); then shift; fi # the --; what follows is for the server
((${#folders[@]} > 0)) || fail "Name the folder of an exported model, e.g. $0 models/digits" 2

mounts=()
for folder in "${folders[@]}"; do
  [[ -d $folder ]] || fail "There is no folder $folder. Write it with scripts/export.py --output=$folder"
  compgen -G "$folder/[0-9]*/saved_model.pb" > /dev/null ||
    fail "No version of a model is in $folder: it must hold one as 1/saved_model.pb. Give the folder of all versions."
  folder=$(cd -- "$folder" && pwd)
  target=/models/${folder##*/}
  # Compared literally: a name may hold what means something else in a pattern.
  literal=${target// /}
  [[ $offered == *"base_path:"[\"\']"$literal"?(/)[\"\']* ]] ||
    fail "$config/models.config has no model with base_path: \"$target\". Add a config { } for it, as for the others."
  mounts+=(--mount "type=bind,source=$folder,target=$target,readonly")
done

command -v docker > /dev/null ||
  fail "There is no docker. Install it, or start tensorflow_model_server with the flags at the end of this script."

# The folder of the configs is mounted, not each file: an editor that writes a new file in the place of the old one
# would leave the server with the old one. The image's own entry point is a shell, which keeps Ctrl-C to itself.
exec docker run --rm --init \
  --publish "$address:${GRPC_PORT:-8500}:8500" \
  --publish "$address:${REST_PORT:-8501}:8501" \
  --mount "type=bind,source=$config,target=/config,readonly" \
  "${mounts[@]}" \
  ${docker_arguments[@]+"${docker_arguments[@]}"} \
  --entrypoint tensorflow_model_server \
  "$image" \
  --port=8500 \
  --rest_api_port=8501 \
  --rest_api_timeout_in_ms=30000 \
  --model_config_file=/config/models.config \
  --model_config_file_poll_wait_seconds=60 \
  --allow_version_labels_for_unavailable_models=true \
  --enable_batching=true \
  --batching_parameters_file=/config/batching.config \
  --monitoring_config_file=/config/monitoring.config \
  "$@"
