"use strict";

// The data's strings reach the page only through text nodes and attribute values: there is no markup to inject into.

const PAGE_SIZE = 50;
const byId = (id) => document.getElementById(id);
const { title, note, protocols, measure, images, questions, unknown, names } = JSON.parse(byId("data").textContent);
const state = { filter: "all", protocol: 0, sort: "file", search: "", page: 0 };
let shown = questions;

// of a page that compares two files, an entry is A's answer and its `second` is B's
const compares = names !== undefined;
const score = (side) => side.scores?.[state.protocol];
const right = (side) => score(side) === 1;
const difference = ({ second, ...first }) => (first.scores && second.scores ? score(second) - score(first) : undefined);
const whole = (number) => number.toLocaleString("en");
const counted = (number, noun) => `${whole(number)} ${noun}${number === 1 ? "" : "s"}`;
const collator = new Intl.Collator("en", { numeric: true });

// value -> what it is called, and which questions it shows
const FILTERS = compares
  ? {
      all: ["All", () => true],
      "only-a": ["Only A right", (entry) => right(entry) && !right(entry.second)],
      "only-b": ["Only B right", (entry) => !right(entry) && right(entry.second)],
      both: ["Both right", (entry) => right(entry) && right(entry.second)],
      neither: ["Neither right", (entry) => !right(entry) && !right(entry.second)],
      differ: ["Answers differ", (entry) => entry.prediction !== entry.second.prediction],
      unanswered: ["No answer", (entry) => entry.error !== undefined || entry.second.error !== undefined],
    }
  : {
      all: ["All", () => true],
      right: ["Right", right],
      wrong: ["Wrong", (entry) => score(entry) < 1],
      zero: ["Zero", (entry) => score(entry) === 0],
      disagree: ["Protocols disagree", (entry) => new Set(entry.scores).size > 1],
      unanswered: ["No answer", (entry) => entry.error !== undefined],
    };
// sorting is stable, so equals stay in the order of the file; questions without an answer come last
const BY_SCORE = compares
  ? {
      gained: ["B better first", (a, b) => (difference(b) ?? -2) - (difference(a) ?? -2)],
      lost: ["A better first", (a, b) => (difference(a) ?? 2) - (difference(b) ?? 2)],
    }
  : {
      lowest: ["lowest score", (a, b) => (score(a) ?? 2) - (score(b) ?? 2)],
      highest: ["highest score", (a, b) => (score(b) ?? -1) - (score(a) ?? -1)],
    };
const SORTS = {
  file: ["file order", () => 0],
  ...BY_SCORE,
  shortest: ["shortest question", (a, b) => a.question.length - b.question.length],
  longest: ["longest question", (a, b) => b.question.length - a.question.length],
  image: ["image id", (a, b) => collator.compare(images[a.image].id, images[b.image].id)],
};

for (const entry of questions) {
  const texts = [entry.id, images[entry.image].id, entry.question, entry.prediction ?? "", entry.second?.prediction ?? ""];
  const options = (entry.options ?? []).map((option) => option[1]);
  entry.haystack = [...texts, ...options, ...(entry.groups ?? []), ...entry.answers.map((answer) => answer.text)].join("\n").toLowerCase();
}

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Text of the data: isolated, so that right-to-left marks in it cannot reorder what stands around it. */
function quoted(text) {
  return text === "" ? make("em", {}, "empty") : make("bdi", {}, text);
}

function grouped(answers, matches) {
  const list = make("ul", { class: "answers" });
  for (const answer of answers) {
    const match = matches(answer); // true, or whose prediction it is
    const item = make("li", match ? { class: "match" } : {}, quoted(answer.text));
    if (answer.count > 1) item.append(make("span", { class: "times" }, ` × ${answer.count}`));
    if (match === true) item.append(make("span", { class: "hidden" }, " (as predicted)"));
    else if (match) item.append(make("span", { class: "times" }, ` (${match})`));
    list.append(item);
  }
  return list;
}

function scoreClass(value) {
  return value === 1 ? "full" : value === 0 ? "none" : "part";
}

const rounded = (value) => String(Math.round(value * 1000) / 1000);
const chosen = (i) => (i === state.protocol ? { class: "chosen" } : {});

/** Whether every protocol says the same of an answer. */
const alike = ({ scores, said }) => scores === undefined || scores.every((value, i) => value === scores[0] && said?.[i] === said?.[0]);

function scoreList(entry) {
  const row = (value, i, name) => {
    const cell = make("dd", { class: scoreClass(value) }, rounded(value));
    if (entry.said?.[i]) cell.append(" (read as ", quoted(entry.said[i]), ")");
    return make("div", chosen(i), make("dt", {}, name), cell);
  };
  const rows = alike(entry) && protocols.length > 1 ? [row(entry.scores[0], state.protocol, "every protocol")] : entry.scores.map((value, i) => row(value, i, protocols[i]));
  return make("dl", { class: "scores" }, ...rows);
}

/** What each protocol says of A's answer and of B's. */
function comparisonTable(entry) {
  const sides = [entry, entry.second];
  const head = make("tr", {}, ...["Protocol", "A", "B"].map((name) => make("th", { scope: "col" }, name)));
  const cell = (side, i) => {
    if (side.scores === undefined) return make("td", {}, "no score");
    const shown = make("td", { class: `score ${scoreClass(side.scores[i])}` }, rounded(side.scores[i]));
    if (side.said?.[i]) shown.append(" (read as ", quoted(side.said[i]), ")");
    return shown;
  };
  const row = (name, i) => make("tr", chosen(i), make("th", { scope: "row" }, name), ...sides.map((side) => cell(side, i)));
  const rows = sides.every(alike) && protocols.length > 1 ? [row("every protocol", state.protocol)] : protocols.map(row);
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
}

/** What each protocol compared, for a question that they score differently. */
function scoreTable(entry) {
  const columns = ["Protocol", "Score", "Prediction as compared", "Answers as compared"];
  const head = make("tr", {}, ...columns.map((name) => make("th", { scope: "col" }, name)));
  const row = ({ prediction, answers }, i) =>
    make(
      "tr",
      chosen(i),
      make("th", { scope: "row" }, protocols[i]),
      make("td", { class: `score ${scoreClass(entry.scores[i])}` }, rounded(entry.scores[i])),
      make("td", {}, quoted(prediction)),
      make("td", {}, grouped(answers, (answer) => answer.text === prediction)),
    );
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...entry.compared.map(row)));
}

function imageOf(index, alt) {
  const image = images[index];
  if (image.error !== undefined) return make("p", { class: "unreadable" }, "Image not shown: ", quoted(image.error));
  const src = `data:image/jpeg;base64,${byId(`image-${index}`).textContent}`;
  const element = make("img", { src, alt, width: image.width, height: image.height, decoding: "async" });
  const button = make("button", { type: "button", class: "image", title: "Enlarge" }, element);
  button.addEventListener("click", () => enlarge(button));
  return button;
}

/** An image over the page, with its question and answer beside it; Escape closes it. */
function enlarge(button) {
  const text = button.closest("article").querySelector(".text").cloneNode(true);
  for (const element of text.querySelectorAll("[id]")) element.removeAttribute("id");
  byId("enlarged").replaceChildren(button.firstElementChild.cloneNode(), text);
  byId("zoom").showModal();
}

function imagesOf(entry, previous) {
  const own = images[entry.image];
  if (previous?.image === entry.image && previous.shown === undefined && entry.shown === undefined) {
    return make("p", { class: "unreadable" }, "the image above: ", quoted(own.id));
  }
  const caption = make("figcaption", {}, "image ", quoted(own.id));
  const figure = make("figure", {}, imageOf(entry.image, `Image ${own.id}`), caption);
  if (entry.shown === undefined) return figure;
  const other = make("figure", { class: "other" });
  if (entry.shown.image !== null) other.append(imageOf(entry.shown.image, `Image ${entry.shown.id}, shown instead`));
  other.append(make("figcaption", {}, "the model was shown image ", quoted(entry.shown.id), " instead"));
  return make("div", {}, figure, other);
}

function prediction(side) {
  if (side.error !== undefined) return make("dd", { class: "error" }, "No answer: ", quoted(side.error));
  if (side.scores === undefined) return make("dd", { class: "prediction" }, quoted(side.prediction));
  const text = make("dd", { class: `prediction ${scoreClass(score(side))}` }, quoted(side.prediction));
  if (side.cut) text.append(make("span", { class: "note" }, "cut at the token limit"));
  if (side.times) text.append(make("span", { class: "note" }, `first of ${side.times} answers`));
  return text;
}

/** A dt and a dd for each file's answer. */
function predictions(entry) {
  if (!compares) return [make("dt", {}, "Prediction"), prediction(entry)];
  const second = prediction(entry.second);
  const shown = entry.second.shown;
  if (shown !== undefined) second.append(make("span", { class: "note" }, "shown image ", quoted(shown.id)));
  return [make("dt", {}, "A"), prediction(entry), make("dt", {}, "B"), second];
}

/** Whether an answer is the prediction, or whose of two predictions it is. */
function predictedBy(entry, answer) {
  const first = answer.matches?.[state.protocol] ?? false;
  if (!compares) return first;
  const second = entry.second.matches[answer.text]?.[state.protocol] ?? false;
  return [first ? "A" : "", second ? "B" : ""].filter(Boolean).join(" and ");
}

function scoresOf(entry) {
  if (compares) return protocols.length === 0 ? [] : [comparisonTable(entry)];
  if (entry.scores === undefined) return [];
  return [entry.compared === undefined ? scoreList(entry) : scoreTable(entry)];
}

function card(entry, place, previous) {
  const heading = make("h2", { id: `question-${place}` }, quoted(entry.question));
  const facts = make("dl", { class: "facts" }, ...predictions(entry), make("dt", {}, "Answers"));
  facts.append(make("dd", {}, grouped(entry.answers, (answer) => predictedBy(entry, answer))));
  if (entry.options !== undefined) {
    const listed = entry.options.map(([letter, text]) => ({ text: `${letter}. ${text}`, count: 1 }));
    facts.append(make("dt", {}, "Options"), make("dd", {}, grouped(listed, () => false)));
  }
  if (entry.groups !== undefined) facts.append(make("dt", {}, "Groups"), make("dd", {}, quoted(entry.groups.join(", "))));
  const text = make("div", { class: "text" }, make("p", { class: "id" }, "question ", quoted(entry.id)), heading, facts, ...scoresOf(entry));
  const article = make("article", { tabindex: "-1", "aria-labelledby": heading.id }, imagesOf(entry, previous), text);
  return make("li", {}, article);
}

/** The means of A and B over what both answer, as `score` compares them. */
function meansOf(entries) {
  const both = entries.filter((entry) => entry.scores !== undefined && entry.second.scores !== undefined);
  if (both.length === 0) return "none that both answer";
  const mean = (value) => (100 * both.reduce((total, entry) => total + value(entry), 0)) / both.length;
  const [first, second] = [mean(score), mean((entry) => score(entry.second))];
  const change = `${second < first ? "−" : "+"}${Math.abs(second - first).toFixed(3)}`;
  const over = both.length === entries.length ? "" : ` of ${whole(both.length)} that both answer`;
  return `${measure} A ${first.toFixed(3)} %, B ${second.toFixed(3)} %${over}, B − A ${change}`;
}

function meanOf(entries) {
  const answered = entries.filter((entry) => entry.scores !== undefined);
  if (answered.length === 0) return "no answer to score";
  const sum = answered.reduce((total, entry) => total + score(entry), 0);
  const percent = (number) => `${((100 * sum) / number).toFixed(3)} %`;
  const mean = `${measure} ${percent(answered.length)}`;
  if (answered.length === entries.length) return mean;
  return `${mean} (${percent(entries.length)} with ${whole(entries.length - answered.length)} unanswered as 0)`;
}

function showPage(page) {
  const start = page * PAGE_SIZE;
  const cards = shown.slice(start, start + PAGE_SIZE).map((entry, i, page) => card(entry, start + i, page[i - 1]));
  state.page = page;
  byId("questions").replaceChildren(...cards);
  byId("questions").start = start + 1;
  byId("pages").hidden = shown.length <= PAGE_SIZE;
  byId("range").textContent = `${whole(start + 1)} to ${whole(start + cards.length)} of ${whole(shown.length)}`;
  byId("previous").disabled = page === 0;
  byId("next").disabled = start + PAGE_SIZE >= shown.length;
  writeAddress();
}

/** The address names what is shown, so that a reload or whoever gets the link sees it too. */
function writeAddress(question = "") {
  const named = { ...state, protocol: protocols[state.protocol], search: byId("search").value, question };
  const usual = { filter: "all", protocol: protocols[0], sort: "file", search: "", page: 0, question: "" };
  const changed = Object.entries(named).filter(([key, value]) => value !== usual[key]);
  const hash = new URLSearchParams(changed).toString();
  if (hash !== location.hash.slice(1)) history.replaceState(null, "", hash === "" ? "#" : `#${hash}`);
}

/** Show what the address names; what it names wrongly is as usual. */
function readAddress() {
  const named = new URLSearchParams(location.hash.slice(1));
  const page = Number(named.get("page"));
  const question = named.get("question");
  state.filter = Object.hasOwn(FILTERS, named.get("filter")) ? named.get("filter") : "all";
  state.sort = Object.hasOwn(SORTS, named.get("sort")) ? named.get("sort") : "file";
  state.protocol = Math.max(protocols.indexOf(named.get("protocol")), 0);
  document.querySelector(`#filters [value=${state.filter}]`).checked = true;
  byId("sort").value = state.sort;
  byId("protocol").value = state.protocol;
  search(named.get("search") ?? "");
  const place = question === null ? -1 : shown.findIndex((entry) => entry.id === question);
  if (place >= 0) {
    showPage(Math.floor(place / PAGE_SIZE));
    focusCard(place % PAGE_SIZE);
  } else if (Number.isInteger(page) && page > 0 && page * PAGE_SIZE < shown.length) {
    showPage(page);
  }
}

/** The shown questions with their answers, as lines of JSON. */
function exportShown() {
  const said = ({ prediction, error, scores }) => ({
    answer: prediction ?? null,
    ...(error === undefined ? {} : { error }),
    ...(scores === undefined ? {} : { scores: Object.fromEntries(protocols.map((name, i) => [name, scores[i]])) }),
  });
  const line = ({ id, image, question, second, answers, ...first }) =>
    JSON.stringify({
      question_id: id,
      image_id: images[image].id,
      question,
      ...(compares ? { A: said(first), B: said(second) } : said(first)),
      answers: answers.flatMap(({ text, count }) => Array(count).fill(text)),
    });
  const file = new Blob(shown.map((entry) => `${line(entry)}\n`), { type: "application/jsonl" });
  const link = make("a", { href: URL.createObjectURL(file), download: `${title}.jsonl` });
  link.click();
  URL.revokeObjectURL(link.href);
}

function update() {
  const found = questions.filter((entry) => entry.haystack.includes(state.search));
  for (const radio of document.querySelectorAll("#filters input")) {
    radio.parentElement.querySelector(".count").textContent = whole(found.filter(FILTERS[radio.value][1]).length);
  }
  shown = found.filter(FILTERS[state.filter][1]).sort(SORTS[state.sort][1]);
  byId("export").disabled = shown.length === 0;
  byId("status").textContent = shown.length === 0 ? "No question matches." : `${counted(shown.length, "question")}, ${(compares ? meansOf : meanOf)(shown)}`;
  showPage(0);
}

/** Another page, if there is one, with the focus on its first question or its last. */
function turn(step, last = false) {
  const page = state.page + step;
  if (page < 0 || page * PAGE_SIZE >= shown.length) return;
  showPage(page);
  focusCard(last ? byId("questions").children.length - 1 : 0);
}

function focusCard(index) {
  const article = byId("questions").children[index].firstElementChild;
  article.focus({ preventScroll: true });
  writeAddress(shown[state.page * PAGE_SIZE + index].id);
  article.scrollIntoView({ block: "nearest" });
}

/** The question before or after the one that has the focus, over the ends of pages too. */
function move(step) {
  const cards = [...byId("questions").children];
  const at = cards.indexOf(document.activeElement.closest("#questions > li"));
  const to = at + step;
  if (to >= 0 && to < cards.length) return focusCard(to);
  return at < 0 ? false : turn(step, step < 0);
}

function search(text) {
  byId("search").value = text;
  state.search = text.trim().toLowerCase();
  update();
}

function focusSearch() {
  byId("search").focus();
  byId("search").select();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (byId("zoom").open) return;
  const searching = event.target === byId("search");
  const choosing = event.target.matches("select");
  const filtering = event.target.matches("[type=radio]"); // left and right change the filter, up and down the question
  const actions = {
    "/": () => !searching && focusSearch(),
    Escape: () => searching && search(""),
    ArrowDown: () => !choosing && move(1),
    ArrowUp: () => !choosing && move(-1),
    ArrowRight: () => !choosing && !filtering && !searching && turn(1),
    ArrowLeft: () => !choosing && !filtering && !searching && turn(-1),
  };
  // an action that says false did not apply: the key stays the browser's
  if (actions[event.key] !== undefined && actions[event.key]() !== false) event.preventDefault();
}

function summary() {
  const unreadable = images.filter((image) => image.error !== undefined).length;
  const parts = [`${counted(questions.length, "question")} on ${counted(images.length, "image")}`];
  if (unreadable > 0) parts.push(`${counted(unreadable, "image")} not shown`);
  if (unknown.length > 0) parts.push(`answers to ids that are not in the data left out: ${unknown.slice(0, 5).join(", ")}`);
  if (unknown.length > 5) parts.push(`and ${whole(unknown.length - 5)} more`);
  return parts.join("; ");
}

document.title = byId("title").textContent = title;
byId("summary").textContent = summary();
byId("note").textContent = note;
for (const [i, name] of (names ?? []).entries()) byId("names").append(make("div", {}, make("dt", {}, "AB"[i]), make("dd", {}, quoted(name))));
for (const [value, [name]] of Object.entries(FILTERS)) {
  const radio = make("input", { type: "radio", name: "filter", value });
  byId("filters").append(make("label", {}, radio, ` ${name} `, make("span", { class: "count" })));
}
byId("sort").append(...Object.entries(SORTS).map(([value, [name]]) => make("option", { value }, name)));
byId("protocol").append(...protocols.map((name, i) => make("option", { value: i }, name)));
byId("search").addEventListener("input", (event) => search(event.target.value));
byId("protocol").addEventListener("change", (event) => { state.protocol = Number(event.target.value); update(); });
byId("sort").addEventListener("change", (event) => { state.sort = event.target.value; update(); });
byId("filters").addEventListener("change", (event) => { state.filter = event.target.value; update(); });
byId("previous").addEventListener("click", () => turn(-1));
byId("next").addEventListener("click", () => turn(1));
byId("close").addEventListener("click", () => byId("zoom").close());
byId("export").addEventListener("click", exportShown);
document.addEventListener("keydown", onKey);
window.addEventListener("hashchange", readAddress);
readAddress();
