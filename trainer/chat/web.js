"use strict";

// Text of the model and of files reaches the page only through text nodes and attribute values.

const byId = (id) => document.getElementById(id);
const { models, examples, limit } = JSON.parse(byId("data").textContent);
const conversation = crypto.randomUUID();
let pending = []; // { name, url, data }
let running = null; // the AbortController of the question that is being answered

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const fail = (text) => { byId("error").textContent = text; };

async function attach(files) {
  fail("");
  for (const file of files) {
    const data = new Uint8Array(await file.arrayBuffer());
    if (data.length > limit) {
      fail(`${file.name}: ${Math.round(data.length / 1e6)} MB, more than ${Math.round(limit / 1e6)} MB`);
      continue;
    }
    let text = "";
    for (let i = 0; i < data.length; i += 32768) text += String.fromCharCode(...data.subarray(i, i + 32768));
    pending.push({ name: file.name, url: URL.createObjectURL(file), data: btoa(text) });
  }
  showPending();
}

function showPending() {
  byId("images").replaceChildren(
    ...pending.map((image, i) => {
      const remove = make("button", { type: "button", "aria-label": `Remove ${image.name}` }, "×");
      remove.addEventListener("click", () => { pending.splice(i, 1); showPending(); byId("text").focus(); });
      return make("li", {}, make("img", { src: image.url, alt: "" }), make("span", {}, image.name), remove);
    }),
  );
}

function turn(kind, who, ...children) {
  const element = make("div", { class: `turn ${kind}` }, make("span", { class: "who" }, who), ...children);
  return element;
}

function follow(element) {
  element.scrollIntoView({ block: "end" });
}

async function ask(event) {
  event.preventDefault();
  const text = byId("text").value.trim();
  if (running !== null || text === "") return;
  fail("");
  const images = pending;
  const shown = images.map((image) => make("img", { src: image.url, alt: image.name }));
  const mine = turn("mine", "You", ...(shown.length ? [make("div", { class: "shown" }, ...shown)] : []), text);
  const answers = models.map((name) => turn("theirs", name));
  const texts = answers.map((answer) => answer.appendChild(document.createTextNode("")));
  byId("log").append(mine, make("div", { class: "answers" }, ...answers));
  byId("examples").hidden = true;
  byId("text").value = "";
  pending = [];
  showPending();
  follow(byId("log").lastElementChild);
  setRunning(new AbortController());
  let refused = false;
  try {
    const body = JSON.stringify({ conversation, text, images: images.map(({ name, data }) => ({ name, data })) });
    const headers = { "Content-Type": "application/json" };
    const response = await fetch("ask", { method: "POST", headers, body, signal: running.signal });
    if (!response.ok) {
      refused = true;
      throw new Error((await response.json()).error);
    }
    await read(response, answers, texts);
  } catch (error) {
    if (error.name === "AbortError") answers.forEach((answer) => answer.append(make("span", { class: "note" }, " [stopped]")));
    else fail(error.message);
    if (refused) { // nothing was asked: the question can be changed
      byId("log").lastElementChild.remove();
      mine.remove();
      byId("text").value = text;
      pending = images;
      showPending();
    }
  } finally {
    setRunning(null);
    byId("text").focus();
  }
}

/** One JSON object a line: { model, piece } or { model, error }. */
async function read(response, answers, texts) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    const lines = (rest + (value ?? "")).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const { model, piece, error } = JSON.parse(line);
      if (error !== undefined) answers[model].append(make("span", { class: "bad" }, error));
      else texts[model].data += piece;
    }
    follow(byId("log").lastElementChild);
    if (done) return;
  }
}

function setRunning(controller) {
  running = controller;
  byId("stop").hidden = controller === null;
  byId("send").disabled = byId("reset").disabled = controller !== null;
  byId("log").setAttribute("aria-busy", String(controller !== null));
}

async function reset() {
  await fetch("reset", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ conversation }) });
  byId("log").replaceChildren();
  pending = [];
  showPending();
  fail("");
  byId("examples").hidden = examples.length === 0;
  byId("text").focus();
}

async function useExample({ image, question }) {
  pending = [];
  const blob = await (await fetch(image)).blob();
  await attach([new File([blob], image.split("/").pop(), { type: blob.type })]);
  byId("text").value = question;
  byId("text").focus();
}

document.title = byId("title").textContent = models.join(" and ");
byId("examples").hidden = examples.length === 0;
byId("examples").querySelector("ul").append(
  ...examples.map((example) => {
    const button = make("button", { type: "button" }, make("img", { src: example.image, alt: "" }), example.question);
    button.addEventListener("click", () => useExample(example));
    return make("li", {}, button);
  }),
);
byId("form").addEventListener("submit", ask);
byId("stop").addEventListener("click", () => running?.abort());
byId("reset").addEventListener("click", reset);
byId("file").addEventListener("change", async (event) => { await attach(event.target.files); event.target.value = ""; });
byId("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) ask(event);
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length > 0) { event.preventDefault(); attach(event.clipboardData.files); }
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => { event.preventDefault(); attach(event.dataTransfer.files); });
byId("text").focus();
