"use strict";
const slider = document.getElementById("step"), caption = document.getElementById("caption");
const evaluations = JSON.parse(slider.dataset.evaluations);
const cells = document.querySelectorAll(".now");

function show() {
  const {when, rewards} = evaluations[slider.value];
  caption.textContent = `${when}, ${rewards}`;
  slider.setAttribute("aria-valuetext", caption.textContent);
  for (const cell of cells) {
    cell.className = `now grid${Number(slider.value) + 1}`;
    cell.setAttribute("aria-label", `${when}: ${cell.dataset.prompt}`);
  }
}

slider.addEventListener("input", show);
document.getElementById("slider").hidden = false;
show();
