// The images of a report: a grid with one map laid over each, and a viewer with all that was said about one.
"use strict";
(() => {
  const find = (id) => document.getElementById(id);
  const data = JSON.parse(find("data").textContent);
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const palette = bytes(data.palette);
  const TITLES = { attention: "Attention", quantized: "Quantized", grad_cam: "Grad-CAM", samples: "Samples" };
  const kindsOf = (run) => Object.keys(TITLES).filter((kind) => run.maps[kind]);
  const buttons = [...document.querySelectorAll("#grid button")];
  const originals = buttons.map((button) => button.querySelector("img"));
  const named = (label) => (data.names ? data.names[label] : String(label));
  const isWrong = (run, index) => run !== undefined && run.classes[index][0] !== data.labels[index];

  // Text only ever becomes text: names come from data.
  function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }

  for (const run of data.runs) for (const map of Object.values(run.maps)) map.bytes = bytes(map.data);

  // One colour scale serves all images, and all runs of a model; attention, its quantized form and its samples are the
  // same quantity, and Grad-CAM is another.
  const familyOf = (kind) => (kind === "grad_cam" ? kind : "attention");
  const ranges = new Map();
  for (const run of data.runs) {
    for (const [kind, map] of Object.entries(run.maps)) {
      const key = JSON.stringify([run.model, familyOf(kind)]);
      const [low, high] = ranges.get(key) ?? [Infinity, -Infinity];
      ranges.set(key, [
        map.low.reduce((a, b) => Math.min(a, b), low),
        map.high.reduce((a, b) => Math.max(a, b), high),
      ]);
    }
  }

  // A map's values, and the range that is drawn.
  function valuesOf(run, kind, number, own) {
    const { height, width, low, high, bytes } = run.maps[kind];
    const size = height * width;
    const step = (high[number] - low[number]) / 255;
    const values = Float64Array.from(bytes.subarray(number * size, (number + 1) * size), (v) => low[number] + v * step);
    const range = own ? [low[number], high[number]] : ranges.get(JSON.stringify([run.model, familyOf(kind)]));
    return { values, height, width, range };
  }

  const shareOf = (value, [low, high]) => (high > low ? Math.min(1, Math.max(0, (value - low) / (high - low))) : 0);

  // Bilinear with half-pixel centres, as the overlays of aib_tf.visualization.
  function enlarge({ values, height, width, range }, newHeight, newWidth) {
    const place = (i, length, newLength) => Math.min(length - 1, Math.max(0, ((i + 0.5) * length) / newLength - 0.5));
    const result = new Float64Array(newHeight * newWidth);
    for (let y = 0; y < newHeight; y++) {
      const v = place(y, height, newHeight);
      const [top, bottom] = [Math.floor(v), Math.ceil(v)];
      for (let x = 0; x < newWidth; x++) {
        const u = place(x, width, newWidth);
        const [left, right] = [Math.floor(u), Math.ceil(u)];
        const upper = values[top * width + left] * (1 - u + left) + values[top * width + right] * (u - left);
        const lower = values[bottom * width + left] * (1 - u + left) + values[bottom * width + right] * (u - left);
        result[y * newWidth + x] = upper * (1 - v + top) + lower * (v - top);
      }
    }
    return { values: result, height: newHeight, width: newWidth, range };
  }

  function canvasOf(height, width, colourAt, className) {
    const canvas = make("canvas", { height, width, className });
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    for (let i = 0; i < height * width; i++) {
      image.data.set(colourAt(i), 4 * i);
      image.data[4 * i + 3] = 255;
    }
    context.putImageData(image, 0, 0);
    return canvas;
  }

  const viridis = (share) => palette.subarray(3 * Math.round(255 * share), 3 * Math.round(255 * share) + 3);

  // A map as it is, one block for each position.
  const drawMap = (map) =>
    canvasOf(map.height, map.width, (i) => viridis(shareOf(map.values[i], map.range)), "pixels");

  // A map in colour over the grey picture.
  function drawOver(original, map) {
    // So that a map with more positions than the picture has pixels stays whole.
    const [height, width] = [original.naturalHeight, original.naturalWidth];
    const scale = Math.max(1, Math.ceil(96 / Math.max(height, width)));
    const canvas = make("canvas", { height: height * scale, width: width * scale });
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(original, 0, 0, canvas.width, canvas.height);
    const picture = context.getImageData(0, 0, canvas.width, canvas.height).data;
    const large = enlarge(map, canvas.height, canvas.width);
    return canvasOf(canvas.height, canvas.width, (i) => {
      const grey = 0.299 * picture[4 * i] + 0.587 * picture[4 * i + 1] + 0.114 * picture[4 * i + 2];
      return [...viridis(shareOf(large.values[i], map.range))].map((colour) => 0.6 * colour + 0.4 * grey);
    });
  }

  function pictureOf(original) {
    const image = make("img", { src: original.src, alt: "" });
    image.classList.toggle("pixels", Math.max(original.naturalHeight, original.naturalWidth) < 160);
    return image;
  }

  function framed(content, index, withBox = true) {
    const frame = make("span", { className: "picture" }, content);
    const [top, left, bottom, right] = data.boxes?.[index] ?? [0, 0, 0, 0];
    if (withBox && bottom > top && right > left) {
      const box = make("span", { className: "box" });
      const sides = { top, left, height: bottom - top, width: right - left };
      for (const [side, share] of Object.entries(sides)) box.style[side] = `${100 * share}%`;
      frame.append(box);
    }
    return frame;
  }

  // The ends of a scale, to three digits of its width.
  function scaleOf([low, high]) {
    const decimals = high > low ? Math.max(0, 2 - Math.floor(Math.log10(high - low))) : 3;
    const written = (value) =>
      decimals > 6 ? value.toExponential(1) : String(Number(value.toFixed(decimals))).replace("-", "−");
    const bar = canvasOf(1, 256, (i) => viridis(i / 255));
    return [make("span", {}, written(low)), bar, make("span", {}, written(high))];
  }

  const percent = (share) => (share >= 0.9995 || share < 0.0005 ? (100 * share).toFixed(0) : (100 * share).toFixed(1)) + "%";

  // The grid.
  const state = { run: data.runs[0], kind: "", filter: "all", own: false, current: 0 };

  function radios(parent, name, entries, chosen, onChange) {
    const legend = parent.querySelector("legend");
    parent.replaceChildren(
      legend,
      ...entries.map(([value, text]) => {
        const input = make("input", { type: "radio", name, value, checked: value === chosen });
        input.addEventListener("change", () => onChange(value));
        return make("label", {}, input, text);
      }),
    );
  }

  const shownButtons = () => buttons.filter((button) => !button.hidden);

  function drawGrid() {
    const { run, kind, own, filter } = state;
    const map = run?.maps[kind];
    buttons.forEach((button, index) => {
      const wrong = isWrong(run, index);
      button.hidden = (filter === "wrong" && !wrong) || (filter === "right" && wrong);
      const content = map
        ? drawOver(originals[index], valuesOf(run, kind, index, own))
        : pictureOf(originals[index]);
      const predicted = run && named(run.classes[index][0]);
      const label = named(data.labels[index]);
      const caption = make("span", { className: wrong ? "caption wrong" : "caption" });
      caption.textContent = wrong ? `✗ ${predicted}, is ${label}` : run ? `✓ ${label}` : label;
      const said = run ? `, predicted ${predicted}, ${wrong ? "wrong" : "right"}` : "";
      button.setAttribute("aria-label", `Image ${data.indices[index]}, ${label}${said}. Open`);
      button.replaceChildren(framed(content, index), caption);
    });
    const shown = shownButtons();
    const here = shown.find((button) => Number(button.dataset.index) === state.current) ?? shown[0];
    buttons.forEach((button) => (button.tabIndex = button === here ? 0 : -1));
    const scale = map && !own ? scaleOf(ranges.get(JSON.stringify([run.model, familyOf(kind)]))) : [];
    find("scale").replaceChildren(...(map && own ? ["each its own range"] : scale));
    const runText = run && data.runs.length > 1 ? `, ${run.name}` : "";
    find("hint").textContent =
      `${shown.length} of ${buttons.length} images${runText}. Click one, or move with the arrow keys and press Enter, ` +
      "to see all maps and probabilities" + (data.runs.length > 1 ? " of all runs." : ".");
  }

  function chooseRun(run) {
    state.run = run;
    const kinds = run ? kindsOf(run).filter((kind) => kind !== "samples") : [];
    if (!kinds.includes(state.kind)) state.kind = kinds[0] ?? "";
    const entries = [...kinds.map((kind) => [kind, TITLES[kind]]), ["", "Picture"]];
    radios(find("kinds"), "kind", entries, state.kind, (kind) => {
      state.kind = kind;
      drawGrid();
    });
    find("kinds").hidden = kinds.length === 0;
    find("own").parentElement.hidden = kinds.length === 0;
    drawGrid();
  }

  // The arrow keys move in the grid as it is laid out.
  function target(key, shown, place) {
    const columns = shown.findIndex((button, i) => i > 0 && button.offsetTop > shown[0].offsetTop);
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[key];
    if (key === "Home") return 0;
    if (key === "End") return shown.length - 1;
    return step === undefined || (columns < 0 && Math.abs(step) !== 1) || !(place + step in shown) ? null : place + step;
  }

  find("grid").addEventListener("keydown", (event) => {
    const shown = shownButtons();
    const place = shown.indexOf(document.activeElement);
    const next = place < 0 ? null : target(event.key, shown, place);
    if (next === null || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    shown[place].tabIndex = -1;
    shown[next].tabIndex = 0;
    shown[next].focus();
    state.current = Number(shown[next].dataset.index);
  });

  // The viewer.
  const viewer = find("viewer");

  function mapPanel(run, kind, index) {
    const draws = run.maps[kind].count / buttons.length;
    const maps = Array.from({ length: draws }, (_, draw) =>
      valuesOf(run, kind, draw * buttons.length + index, find("viewer-own").checked),
    );
    const range = [Math.min(...maps.map((map) => map.range[0])), Math.max(...maps.map((map) => map.range[1]))];
    const title = kind === "samples" && draws > 1 ? `${draws} ${TITLES[kind].toLowerCase()}` : TITLES[kind];
    const frames = maps.map((map, draw) => {
      const drawn = find("over").checked ? drawOver(originals[index], { ...map, range }) : drawMap({ ...map, range });
      drawn.setAttribute("role", "img");
      drawn.setAttribute("aria-label", `${TITLES[kind]}${draws > 1 ? ` ${draw + 1}` : ""} of ${run.name}`);
      return framed(drawn, index);
    });
    const content = make("div", { className: "draws" }, ...frames);
    content.style.setProperty("--draws", Math.ceil(Math.sqrt(draws)));
    const [low, bar, high] = scaleOf(range);
    const scale = make("span", { className: "scale" }, bar, low, high);
    return make("div", { className: "map" }, title, content, scale);
  }

  function chancesOf(run, index) {
    const list = make("ul", { className: "chances" });
    const entries = run.classes[index].map((label, i) => [label, run.probabilities[index][i]]);
    if (!run.classes[index].includes(data.labels[index])) entries.push([data.labels[index], run.truth[index]]);
    for (const [label, probability] of entries) {
      const bar = make("i");
      bar.style.backgroundSize = `${100 * probability}% 100%`;
      const name = make("span", { className: label === data.labels[index] ? "true" : "" }, named(label));
      list.append(make("li", {}, name, bar, make("span", {}, percent(probability))));
    }
    return list;
  }

  function answerOf(run, index) {
    const wrong = isWrong(run, index);
    const said = `${wrong ? "✗" : "✓"} predicts ${named(run.classes[index][0])}, ${percent(run.probabilities[index][0])}`;
    const heading = data.runs.length > 1 ? [make("h3", {}, run.name)] : [];
    return make(
      "div",
      { className: "answer" },
      ...heading,
      make("p", { className: wrong ? "wrong" : "" }, said),
      make("div", { className: "maps" }, ...kindsOf(run).map((kind) => mapPanel(run, kind, index))),
      chancesOf(run, index),
    );
  }

  function show(index) {
    state.current = index;
    const label = make("small", {}, `true class ${named(data.labels[index])}`);
    find("viewer-title").replaceChildren(`Image ${data.indices[index]} `, label);
    const original = make("div", { className: "original" }, framed(pictureOf(originals[index]), index));
    const answers = make("div", { className: "answers" }, ...data.runs.map((run) => answerOf(run, index)));
    find("stage").className = data.runs.length > 1 ? "several" : "";
    find("stage").replaceChildren(original, answers);
    if (!viewer.open) viewer.showModal();
  }

  function move(step) {
    const shown = shownButtons();
    const place = shown.indexOf(buttons[state.current]);
    show(Number(shown[(place + step + shown.length) % shown.length].dataset.index));
  }

  buttons.forEach((button, index) => button.addEventListener("click", () => show(index)));
  find("previous").addEventListener("click", () => move(-1));
  find("next").addEventListener("click", () => move(1));
  find("close").addEventListener("click", () => viewer.close());
  for (const id of ["over", "viewer-own"]) find(id).addEventListener("change", () => show(state.current));
  viewer.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || !["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    event.preventDefault();
    move(event.key === "ArrowLeft" ? -1 : 1);
  });
  viewer.addEventListener("click", (event) => {
    if (event.target === viewer) viewer.close(); // beside it
  });
  viewer.addEventListener("close", () => {
    const button = buttons[state.current];
    buttons.forEach((each) => (each.tabIndex = each === button ? 0 : -1));
    button.focus();
  });

  // Where the pictures are there, so that overlays can be drawn.
  Promise.all(originals.map((image) => image.decode())).then(() => {
    const select = find("run");
    select.replaceChildren(...data.runs.map((run, i) => make("option", { value: String(i) }, run.name)));
    select.addEventListener("change", () => chooseRun(data.runs[Number(select.value)]));
    find("run-control").hidden = data.runs.length < 2;
    const filters = [["all", "All"], ["right", "Right"], ["wrong", "Wrong"]];
    radios(find("filter"), "filter", filters, "all", (filter) => {
      state.filter = filter;
      drawGrid();
    });
    find("filter").hidden = data.runs.length === 0;
    find("own").addEventListener("change", () => {
      state.own = find("own").checked;
      drawGrid();
    });
    find("controls").hidden = data.runs.length === 0;
    chooseRun(data.runs[0]);
  });
})();
