"use strict";
// Enlarges the images of a figure: click or Enter opens, arrow keys go to the next, Escape closes.
{
  const buttons = [...document.querySelectorAll("button.zoom")];
  const dialog = document.getElementById("large");
  const shown = () => buttons.filter((button) => button.offsetParent !== null);
  let current = null;

  function place(button) {
    current = button;
    const figure = button.closest("figure");
    const images = button.cloneNode(true), caption = figure.querySelector("figcaption").cloneNode(true);
    const frame = document.createElement("div");
    frame.className = button.className.replace("zoom", "frame");
    frame.style.cssText = button.style.cssText;
    frame.append(...images.childNodes);
    frame.setAttribute("role", "group");
    dialog.querySelector(".body").replaceChildren(frame, caption);
    dialog.querySelector(".place").textContent = `${shown().indexOf(button) + 1} of ${shown().length}`;
  }

  function step(by) {
    const all = shown();
    place(all[(all.indexOf(current) + by + all.length) % all.length]);
  }

  for (const button of buttons) {
    button.addEventListener("click", () => {
      place(button);
      dialog.showModal();
    });
  }
  if (dialog) {
    document.documentElement.classList.add("zooms");
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
    dialog.addEventListener("close", () => current?.focus());
    dialog.addEventListener("keydown", (event) => {
      if (event.key === "ArrowRight") step(1);
      else if (event.key === "ArrowLeft") step(-1);
      else return;
      event.preventDefault();
    });
    dialog.querySelector(".previous").addEventListener("click", () => step(-1));
    dialog.querySelector(".next").addEventListener("click", () => step(1));
    dialog.querySelector(".close").addEventListener("click", () => dialog.close());
  }
}

// Values of a chart under the pointer, or at the place that the arrow keys choose.
for (const svg of document.querySelectorAll("svg[data-series]")) {
  const series = JSON.parse(svg.dataset.series), [left, width] = JSON.parse(svg.dataset.span);
  const steps = [...new Set(series.flatMap(([, points]) => points.map(([x]) => x)))].sort((a, b) => a - b);
  const line = svg.querySelector("path").cloneNode();
  line.setAttribute("class", "cursor");
  const values = document.createElement("output");
  values.className = "values";
  svg.after(values);
  let at = steps.length - 1;

  const text = ([name, points]) => {
    const found = points.find(([x]) => x === steps[at]);
    return found && `${name} ${found[1]}${found[2] ? ` ± ${found[2]}` : ""}`;
  };
  function mark() {
    line.setAttribute("d", `M${50 + (300 * (steps[at] - left)) / width} 16V166`);
    svg.append(line);
    values.textContent = `${svg.dataset.unit} ${steps[at]}: ${series.map(text).filter(Boolean).join(", ")}`;
  }
  function clear() {
    line.remove();
    values.textContent = "";
  }
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = left + (width * (((event.clientX - box.left) / box.width) * 360 - 50)) / 300;
    at = steps.reduce((best, step, i) => (Math.abs(step - x) < Math.abs(steps[best] - x) ? i : best), 0);
    mark();
  });
  svg.addEventListener("pointerleave", clear);
  svg.addEventListener("blur", clear);
  svg.addEventListener("focus", () => svg.matches(":focus-visible") && mark());
  svg.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    at = Math.min(steps.length - 1, Math.max(0, at + by));
    mark();
  });
}
