"use strict";
const slider = document.getElementById("step"), said = document.getElementById("said");
const evaluations = JSON.parse(slider.dataset.evaluations);
const cells = document.querySelectorAll(".now");

function show() {
  const {when, verdict} = evaluations[slider.value];
  said.textContent = `${when}, ${verdict}`;
  slider.setAttribute("aria-valuetext", said.textContent);
  for (const cell of cells) {
    cell.className = `now strip${Number(slider.value) + 1}`;
    cell.setAttribute("aria-label", `${when}: ${cell.dataset.prompt}`);
  }
}

slider.addEventListener("input", show);
document.getElementById("slider").hidden = false;
show();
