// The page: a text, the models that are asked about it whenever it changes, and what they say.

import { bytesOf, joined, textOf, toBase64 } from "./content.js";
import { Panel } from "./panel.js";
import { models, save, streamed } from "./server.js";

const BEGINNING = "The end of a token is a guess. Type here, or paste a text.";
const find = (id) => document.getElementById(id);
const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;

let panels = [];
let limits = { most_bytes: 0 };
const stale = new Set();
let asking = null;
let goingOn = null;
let later = 0;

const content = () => bytesOf(find("text").value, find("escapes").checked);
const settings = () => ({ boundaries: chosen("boundaries"), seed: Math.trunc(Number(find("seed").value)) || 0 });
const asked = (some) => some.map((panel) => ({ model: panel.index, step: panel.step }));
const level = () => Number(document.querySelector('input[name="level"]:checked')?.value ?? 0);

function notice(text) {
  find("notice").textContent = text;
  find("notice").hidden = !text;
}

const sentence = (error) =>
  error instanceof TypeError ? "The server does not answer: is its command still running?" : error.message;

/** Ask about the text once nobody types for a moment. Until then no answer is one to what stands there now. */
function askSoon(some = panels) {
  asking?.abort();
  asking = null;
  for (const panel of some) {
    stale.add(panel);
    panel.wait();
  }
  clearTimeout(later);
  later = setTimeout(ask, find("text").value.length > 20000 ? 500 : 120);
}

async function ask() {
  const bytes = content();
  find("size").textContent = `${bytes.length.toLocaleString("en")} bytes`;
  asking?.abort();
  if (bytes.length > limits.most_bytes) {
    notice(`The text has ${bytes.length.toLocaleString("en")} bytes; this page takes up to ${limits.most_bytes.toLocaleString("en")}.`);
    return;
  }
  const own = new AbortController();
  asking = own;
  const some = [...stale];
  try {
    const values = { text: toBase64(bytes), models: asked(some), ...settings() };
    await streamed("boundaries", values, own.signal, (message) => {
      // An answer to an older text is none.
      if (own !== asking) return;
      const panel = panels[message.model];
      if (message.state === "done") {
        panel.content = bytes;
        stale.delete(panel);
      }
      panel.tell(message);
    });
    if (own === asking) notice("");
  } catch (error) {
    if (error.name !== "AbortError" && own === asking) notice(sentence(error));
  }
}

async function goOn() {
  stop();
  const own = new AbortController();
  goingOn = own;
  find("stop").disabled = false;
  const values = {
    text: toBase64(content()), models: asked(panels), ...settings(),
    temperature: Number(find("temperature").value), max_bytes: Math.trunc(Number(find("most").value)),
  };
  try {
    await streamed("continue", values, own.signal, (message) => {
      if (own === goingOn) panels[message.model].goOn(message);
    });
  } catch (error) {
    if (error.name !== "AbortError") notice(sentence(error));
  }
  if (own === goingOn) stop();
}

function stop() {
  if (!goingOn) return;
  goingOn.abort();
  goingOn = null;
  for (const panel of panels) if (!panel.find(".more").hidden) panel.goOn({ state: "stopped" });
  find("stop").disabled = true;
}

/** What every model says of a sign; of one in a text that goes on, only its own model. */
function point(panel, sign, grown) {
  for (const one of panels) {
    one.signs.mark(grown ? -1 : sign);
    one.more.mark(grown && one === panel ? sign : -1);
  }
  const { columns } = grown ? panel.more : panel.signs;
  const shown = document.createElement("p");
  const text = document.createElement("span");
  text.className = "sign";
  text.dir = "auto";
  text.textContent = (columns.text[sign] ?? "").replace("⏎\n", "⏎");
  const where = document.createElement("span");
  where.className = "note";
  where.textContent = grown ? `  added, byte ${panel.more.offset(sign)}` : `  byte ${panel.signs.offset(sign)}, ${columns.size[sign]} long`;
  shown.append(text, where);
  const table = document.createElement("table");
  for (const one of grown ? [panel] : panels) {
    const row = table.insertRow();
    for (const part of one.details(sign, grown)) row.insertCell().textContent = part;
  }
  find("detail").replaceChildren(shown, table);
}

function setText(bytes) {
  const { text, escapes } = textOf(bytes);
  find("text").value = text;
  find("escapes").checked = escapes;
  changed();
}

function changed() {
  stop();
  for (const panel of panels) panel.forget();
  askSoon();
}

async function read(file) {
  if (file.size > limits.most_bytes) {
    notice(`${file.name} has ${file.size.toLocaleString("en")} bytes; this page takes up to ${limits.most_bytes.toLocaleString("en")}.`);
    return;
  }
  notice("");
  setText(new Uint8Array(await file.arrayBuffer()));
}

async function saveAs(format) {
  try {
    const values = { text: toBase64(content()), models: asked(panels), ...settings(), format, shading: chosen("colour") };
    await save(values, `boundaries.${format}`);
  } catch (error) {
    notice(sentence(error));
  }
}

function levelSwitches(most) {
  find("levels").hidden = most < 2;
  for (let one = 0; one <= most; one += 1) {
    const label = document.createElement("label");
    const button = document.createElement("input");
    Object.assign(button, { type: "radio", name: "level", value: one, checked: one === 0 });
    button.addEventListener("change", () => panels.forEach((panel) => panel.draw(level())));
    label.append(button, one ? ` level ${one}` : " all levels");
    find("levels").append(label);
  }
}

/** A run that still trains has other checkpoints after a while. */
async function refresh() {
  if (panels.every((panel) => panel.info.finished)) return;
  try {
    const found = await models();
    const newer = panels.filter((panel) => panel.update(found.models[panel.index]));
    if (newer.length) askSoon(newer);
  } catch (error) {
    notice(sentence(error));
  }
}

async function begin() {
  try {
    limits = await models();
  } catch (error) {
    notice(sentence(error));
    return;
  }
  const kept = (bytes) => setText(joined([content(), bytes]));
  const callbacks = { told: point, asked: (panel) => askSoon([panel]), kept };
  panels = limits.models.map((info, index) => new Panel(info, index, callbacks));
  find("models").append(...panels.map((panel) => panel.article));
  levelSwitches(Math.max(...limits.models.map((info) => info.levels)));
  find("text").value ||= BEGINNING;
  find("text").addEventListener("input", changed);
  for (const id of ["escapes", "seed"]) find(id).addEventListener("input", changed);
  for (const one of document.querySelectorAll('input[name="boundaries"]')) one.addEventListener("change", changed);
  find("continue").addEventListener("click", goOn);
  find("stop").addEventListener("click", stop);
  find("save-html").addEventListener("click", () => saveAs("html"));
  find("save-svg").addEventListener("click", () => saveAs("svg"));
  find("open").addEventListener("click", () => find("file").click());
  find("file").addEventListener("change", (event) => event.target.files[0] && read(event.target.files[0]));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    read(event.dataTransfer.files[0]);
  });
  setInterval(refresh, 10000);
  askSoon();
}

begin();
