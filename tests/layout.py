"""What a picky reader would see on a page in the browser: content beyond its card, or text of too little contrast."""

from __future__ import annotations

from tests.browser import Browser

_SCRIPT = """
const found = [];
const kind = (one) => `${one.tagName.toLowerCase()}.${one.getAttribute("class") ?? ""}`;
const name = (one) => `${kind(one)} "${one.textContent.trim().slice(0, 40)}"`;
const root = document.documentElement;
if (root.scrollWidth > innerWidth) found.push(`the page is ${root.scrollWidth} wide, the screen ${innerWidth}`);

const scrolls = (one) => ["auto", "scroll"].includes(getComputedStyle(one).overflowX) && one.matches(".scrolls");
const cards = ".card, details, figure, section, td, th, .finding, dialog, .choice, button";
for (const card of document.querySelectorAll(cards)) {
  if (!card.getClientRects().length || scrolls(card)) continue;
  const right = card.getBoundingClientRect().right;
  for (const one of card.querySelectorAll("*")) {
    const box = one.getBoundingClientRect();
    const inner = one.parentElement.closest(".scrolls");
    if (!box.width || (inner && card.contains(inner) && scrolls(inner))) continue;
    if (box.right > right + 1) found.push(`${name(one)} ends ${Math.round(box.right - right)} beyond ${name(card)}`);
  }
}

for (const svg of document.querySelectorAll("svg")) {
  const labels = [...svg.querySelectorAll("text")].map((one) => [one, one.getBoundingClientRect()]);
  labels.forEach(([one, a], i) => labels.slice(i + 1).forEach(([other, b]) => {
    const apart = a.right <= b.left || b.right <= a.left || a.bottom <= b.top + 1 || b.bottom <= a.top + 1;
    if (a.width && !apart) found.push(`the labels ${one.textContent} and ${other.textContent} overlap`);
  }));
}
for (const one of document.querySelectorAll("img")) {
  const fills = getComputedStyle(one).objectFit === "fill" && one.naturalWidth && one.offsetHeight > 8;
  const stretch = fills ? one.offsetWidth / one.offsetHeight / (one.naturalWidth / one.naturalHeight) : 1;
  if (Math.abs(stretch - 1) > 0.05) found.push(`the image ${one.alt} is stretched by ${stretch.toFixed(2)}`);
}

const channel = (c) => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return { rgb: n.slice(0, 3), a: n[3] ?? 1 }; };
const luminance = (rgb) => { const [r, g, b] = rgb.map(channel); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
function background(one) {
  for (; one; one = one.parentElement) {
    const { rgb, a } = parse(getComputedStyle(one).backgroundColor);
    if (a === 1) return rgb;
  }
  return matchMedia("(prefers-color-scheme: dark)").matches ? [0, 0, 0] : [255, 255, 255];
}
for (const one of document.querySelectorAll("body *")) {
  const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  const style = getComputedStyle(one);
  const dim = style.visibility === "hidden" || one.disabled || one.matches(":disabled *");
  if (!own || dim || !one.getClientRects().length || ["SCRIPT", "STYLE", "title"].includes(one.tagName)) continue;
  const ink = parse(one instanceof SVGElement ? style.fill : style.color).rgb;
  const [high, low] = [luminance(ink), luminance(background(one))].sort((a, b) => b - a);
  const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
  const ratio = (high + 0.05) / (low + 0.05);
  if (ratio < (large ? 3 : 4.5)) found.push(`contrast ${ratio.toFixed(2)} of ${name(one)}`);
}
return [...new Set(found)].slice(0, 10);
"""


def problems(page: Browser) -> list[str]:
    """Return what ends beyond the page or its card, labels of charts that overlap, stretched images, and text whose
    contrast is below WCAG 2's AA; 10 at most.

    AA is a ratio of 4.5, or 3 for text of at least 24 px, or 18.66 px in bold. Content of cards that scroll with a cue
    (class "scrolls") may be wider than they are.
    """
    return page.run(_SCRIPT)
