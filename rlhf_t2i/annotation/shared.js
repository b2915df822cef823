// What the annotation pages share: the state that the server keeps, requests, images, keys and the entrance. A page has a
// function show(next), which sets and shows a state. A reload, or a closed browser, loses nothing.
"use strict";

const RETRY_MILLISECONDS = 1000;
const at = (id) => document.getElementById(id);

let state = null;
let busy = false; // from an answer until the next images are visible; key presses in between are ignored

function setMessage(text) {
  at("message").textContent = text;
}

async function request(path, body) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const response = await fetch(path, options);
  return { status: response.status, ...(await response.json()) };
}

async function post(path, body) {
  for (;;) {
    try {
      return await request(path, body);
    } catch {
      // The server records an answer only once, so it is safe to send it until a response comes.
      setMessage("The server does not respond. Your answer will be sent again until it does.");
      await new Promise((resume) => setTimeout(resume, RETRY_MILLISECONDS));
    }
  }
}

async function load(image, name) {
  if (image.dataset.name === name) return;
  image.src = `/image/${name}`;
  await image.decode();
  image.dataset.name = name;
  image.style.imageRendering = image.naturalWidth < 128 ? "pixelated" : "auto";
  image.closest(".choice")?.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
}

async function exchange(path, body) {
  if (busy) return;
  busy = true;
  at("images").classList.add("busy");
  try {
    const reply = await post(path, body);
    setMessage(reply.error ?? reply.message ?? "");
    if (reply.status === 401) {
      at("questions").hidden = true;
      at("entrance").hidden = false;
    }
    const next = reply.status === 200 ? reply : reply.state;
    if (next) await show(next);
  } catch {
    state = null; // an answer about invisible images would be wrong
    setMessage("An image could not be loaded. Reload the page.");
  } finally {
    busy = false;
    at("images").classList.remove("busy");
  }
}

// Calls send(answer) for the keys of an answer and for the buttons that have it as data-answer.
function listen(keys, send) {
  document.addEventListener("keydown", (event) => {
    const free = !(event.repeat || event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "INPUT");
    const answer = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!answer || !free) return;
    event.preventDefault();
    send(answer);
  });
  for (const button of document.querySelectorAll("[data-answer]")) {
    button.addEventListener("click", () => {
      send(button.dataset.answer);
      button.blur();
    });
  }
}

function start() {
  at("entrance").addEventListener("submit", async (event) => {
    event.preventDefault();
    await exchange("/enter", { annotator: at("name").value, token: at("token")?.value ?? "" });
    if (state) sessionStorage.setItem("annotator", state.annotator);
  });
  if (sessionStorage.getItem("annotator")) exchange("/enter", { annotator: sessionStorage.getItem("annotator") });
}
