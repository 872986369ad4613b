"use strict";
const page = JSON.parse(document.getElementById("plans").textContent);
const plans = page.points;
const slider = document.getElementById("slider");
const memory = document.getElementById("memory");
const context = document.getElementById("context");
const copy = document.getElementById("copy");
const show = (id, text) => { document.getElementById(id).textContent = text; };
const chosen = () => document.querySelector("input[name=format]:checked").value;
const size = (bytes) => bytes < 999.95e6 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(2)} GB`;

const dots = [...document.querySelectorAll(".charts circle.mark")];
const marker = document.createElementNS("http://www.w3.org/2000/svg", "circle");
marker.setAttribute("class", "marker");
marker.setAttribute("r", "7");
dots[0].parentNode.append(marker);

// What a reader takes beside the tensors; nothing where no context is chosen, or none is known.
const beside = () => page.contexts[chosen()][context.value] ?? 0;

// What a plan takes where it has to fit: as a file, or as what is in a GPU's memory.
const taken = (point) => context.value === "" ? point.stored_bytes : point.vram_bytes + beside();

function update() {
  const format = chosen();
  const points = plans[format];
  slider.max = points.length - 1;
  const index = Math.min(Number(slider.value), points.length - 1);
  const point = points[index];
  show("bpw", `${point.bpw} bpw`);
  show("size", size(point.stored_bytes));
  show("damage", `${point.damage} nats/token`);
  show("words", point.words);
  show("beside", context.value === "" ? "" :
    `With a context of ${context.value} tokens: ${size(taken(point))} of GPU memory, cache and computing included.`);
  show("shares", point.shares);
  const output = page.outputs[format][index];
  show("command", `bpwise quantize ${page.original} ${output} --bpw ${point.bpw} --measurement ${page.measurement}`);
  copy.textContent = "Copy";
  const names = Object.keys(plans);
  const before = names.slice(0, names.indexOf(format)).reduce((sum, name) => sum + plans[name].length, 0);
  for (const place of ["cx", "cy"]) {
    marker.setAttribute(place, dots[before + index].getAttribute(place));
  }
  marker.setAttribute("stroke", dots[before + index].getAttribute("fill"));
  for (const map of document.querySelectorAll("[data-map]")) {
    map.hidden = map.dataset.map !== format;
  }
  const cells = document.querySelectorAll(`[data-map="${format}"] rect.mark`);
  cells.forEach((cell, number) => {
    const share = Math.min(Math.max((point.bits[number] - 2) / 6.5, 0), 1);
    cell.style.fillOpacity = 0.08 + 0.92 * share;
    if (!/\.\d+\./.test(point.names[number])) { // outside of the blocks the number is written beside the cell
      cell.nextElementSibling.textContent = point.bits[number];
    }
    cell.firstChild.textContent = `${point.names[number]}: ${point.bits[number]} bits per weight`;
  });
}

function fit() {
  const room = Number(memory.value) * page.unit_bytes;
  const points = plans[chosen()];
  const fitting = points.filter((point) => taken(point) <= room).length;
  show("fits", room > 0 && fitting === 0 ? "No plan is that small." : "");
  if (room > 0) {
    slider.value = Math.max(0, fitting - 1);
  }
  update();
}

function offer() {
  const lengths = Object.keys(page.contexts[chosen()]);
  const before = context.value;
  context.replaceChildren(new Option("no tokens (tensors alone)", ""), ...lengths.map((length) => new Option(`${length} tokens`, length)));
  context.value = lengths.includes(before) ? before : "";
  document.getElementById("context-label").hidden = lengths.length === 0;
  const points = plans[chosen()];
  const middle = points[Math.floor(points.length / 2)].stored_bytes / page.unit_bytes;
  memory.placeholder = Number(middle.toPrecision(2));
  fit();
}

function copied() {
  // The clipboard's own interface asks for permission, and is not there for all files; what is selected can be copied.
  getSelection().selectAllChildren(document.getElementById("command"));
  copy.textContent = document.execCommand("copy") ? "Copied" : "Press Ctrl+C";
}

slider.addEventListener("input", update);
memory.addEventListener("input", fit);
context.addEventListener("change", fit);
copy.addEventListener("click", copied);
for (const choice of document.querySelectorAll("input[name=format]")) {
  choice.addEventListener("change", offer);
}
slider.max = plans[chosen()].length - 1;
slider.value = plans[chosen()].findIndex((point) => point.bpw >= 4.5);
offer();
