"use strict";
const plans = JSON.parse(document.getElementById("plans").textContent);
const slider = document.getElementById("slider");
const memory = document.getElementById("memory");
const show = (id, text) => { document.getElementById(id).textContent = text; };
const chosen = () => document.querySelector("input[name=format]:checked");

function update() {
  const format = chosen().value;
  const points = plans[format];
  slider.max = points.length - 1;
  const point = points[Math.min(Number(slider.value), points.length - 1)];
  show("bpw", `${point.bpw} bpw`);
  show("size", `${(point.stored_bytes / 1e9).toFixed(3)} GB`);
  show("damage", `${point.damage} nats/token`);
  show("shares", point.shares);
  const output = `OUT${chosen().dataset.suffix}`;
  show("command", `bpwise quantize MODEL ${output} --bpw ${point.bpw} --measurement M`);
  for (const map of document.querySelectorAll("[data-map]")) {
    map.hidden = map.dataset.map !== format;
  }
  const cells = document.querySelectorAll(`[data-map="${format}"] rect.mark`);
  cells.forEach((cell, index) => {
    const share = Math.min(Math.max((point.bits[index] - 2) / 6.5, 0), 1);
    cell.style.fillOpacity = 0.08 + 0.92 * share;
    if (!/\.\d+\./.test(point.names[index])) { // outside of the blocks the number is written beside the cell
      cell.nextElementSibling.textContent = point.bits[index];
    }
    cell.firstChild.textContent = `${point.names[index]}: ${point.bits[index]} bits per weight`;
  });
}

function fit() {
  const room = Number(memory.value) * 1e9;
  const points = plans[chosen().value];
  const fitting = points.filter((point) => point.stored_bytes <= room).length;
  show("fits", room > 0 && fitting === 0 ? "No plan is that small." : "");
  if (room > 0) {
    slider.value = Math.max(0, fitting - 1);
  }
  update();
}

slider.addEventListener("input", update);
memory.addEventListener("input", fit);
for (const choice of document.querySelectorAll("input[name=format]")) {
  choice.addEventListener("change", fit);
}
slider.max = plans[chosen().value].length - 1;
slider.value = plans[chosen().value].findIndex((point) => point.bpw >= 4.5);
update();
