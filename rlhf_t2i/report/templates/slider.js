"use strict";
// Chooses the evaluation whose images are on the right, with their scores and passes.
const slider = document.getElementById("step");
if (slider) {
  const caption = document.getElementById("caption"), evaluations = JSON.parse(slider.dataset.evaluations);
  const cells = document.querySelectorAll(".now");
  const show = () => {
    const { when, rewards, scores, passes } = evaluations[slider.value];
    caption.textContent = `${when}, ${rewards}`;
    slider.setAttribute("aria-valuetext", caption.textContent);
    for (const cell of cells) {
      const i = Number(cell.dataset.cell), passed = passes[i];
      cell.className = `now grid${Number(slider.value) + 1}${passed === undefined ? "" : passed ? " pass" : " fail"}`;
      const mark = passed === undefined ? "" : passed ? ", passes" : ", does not pass";
      cell.setAttribute("aria-label", `${when}: ${cell.dataset.prompt}${mark}`);
      const figure = cell.closest("figure");
      for (const after of figure.querySelectorAll("[data-after]")) after.textContent = scores[after.dataset.after][i];
    }
  };
  slider.addEventListener("input", show);
  document.getElementById("slider").hidden = false;
  show();
}
