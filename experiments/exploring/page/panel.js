// The panel of one model: its text, figures, tokens, and how it goes on.

import { fromBase64, shownBytes } from "./content.js";
import { Signs } from "./signs.js";

const MORE = 400;
const number = (value, digits) => (value === null ? "–" : value.toFixed(digits));
const STATES = { opening: "opening the checkpoint…", compiling: "compiling, up to a minute…", superseded: "" };

export class Panel {
  /** `told`: of the number of a sign in this panel; `asked`: for another checkpoint; `kept`: for bytes to add to the text. */
  constructor(info, index, { told, asked, kept }) {
    this.index = index;
    this.step = null;
    this.answer = null;
    this.grown = null;
    this.level = 0;
    const article = document.getElementById("model").content.cloneNode(true).firstElementChild;
    this.article = article;
    this.find = (what) => article.querySelector(what);
    this.signs = new Signs(this.find("pre.shown"), (sign) => told(this, sign, false));
    this.more = new Signs(this.find("pre.grown"), (sign) => told(this, sign, true));
    this.find("pre.shown").setAttribute("aria-label", `the text by ${info.name}`);
    this.find("pre.grown").setAttribute("aria-label", `how ${info.name} goes on`);
    this.find(".steps input").addEventListener("input", (event) => {
      this.step = this.positions[event.target.value];
      this.#label();
      asked(this);
    });
    this.find(".keep").addEventListener("click", () => kept(this.grown));
    this.find("details").addEventListener("toggle", () => this.#tokens(MORE));
    this.find(".further").addEventListener("click", () => this.#tokens(this.shownTokens + 4 * MORE));
    this.update(info);
  }

  /** What is known of the model now. Returns whether its newest model is another one, and asked for. */
  update(info) {
    const before = this.info;
    const another = before && (before.finished !== info.finished || (!info.finished && before.steps.at(-1) !== info.steps.at(-1)));
    this.info = info;
    this.find("h2").textContent = info.name;
    const parts = [info.about, `${info.parameters.toLocaleString("en")} parameters`];
    if (info.levels > 1) parts.push(`${info.levels} levels`);
    if (!info.levels) parts.push("no token level");
    this.find(".about").textContent = parts.filter(Boolean).join(", ");
    const end = info.steps.at(-1) === info.total_steps ? info.steps.slice(0, -1) : info.steps;
    this.positions = info.finished ? [...end, null] : [...info.steps.slice(0, -1), null];
    if (!before && info.step !== null && info.step !== info.steps.at(-1)) this.step = info.step;
    // A checkpoint that is not kept any more may still be shown.
    if (this.step !== null && !this.positions.includes(this.step)) {
      this.positions = [...[...this.positions.slice(0, -1), this.step].sort((a, b) => a - b), null];
    }
    const slider = this.find(".steps input");
    this.find(".steps").hidden = this.positions.length < 2;
    slider.max = this.positions.length - 1;
    slider.value = Math.max(0, this.positions.indexOf(this.step));
    this.#label();
    return Boolean(another) && this.step === null;
  }

  #label() {
    const { steps, finished, total_steps: total } = this.info;
    const step = this.step ?? (finished ? null : steps.at(-1));
    const gone = this.step === null || steps.includes(this.step) ? "" : ", no longer kept";
    const text = step === null || step === undefined ? "the end" : `step ${step}${total ? ` of ${total}` : ""}${gone}`;
    this.find(".steps output").textContent = text;
    this.find(".steps input").setAttribute("aria-valuetext", text);
  }

  /** Whether what is shown is no longer, or not yet, what the model makes of the text. */
  get stale() {
    return this.article.classList.contains("stale");
  }

  /** That an answer is no longer, or not yet, the one to the text. */
  wait() {
    this.article.classList.add("stale");
    this.article.setAttribute("aria-busy", "true");
  }

  /** A message of the server about the text. */
  tell(message) {
    const state = this.find(".figures .state");
    state.classList.toggle("failed", message.state === "error");
    if (message.state === "done") {
      this.article.classList.remove("stale");
      this.article.removeAttribute("aria-busy");
      this.answer = message;
      state.textContent = "";
      this.draw(this.level);
    } else if (message.state === "error") {
      this.article.removeAttribute("aria-busy");
      state.textContent = message.error;
    } else if (message.state === "working") {
      state.textContent = `${Math.round(100 * message.fraction)} %`;
    } else {
      state.textContent = STATES[message.state] ?? "";
    }
  }

  /** Draw the answer with the boundaries of a level; 0: of all. */
  draw(level) {
    this.level = level;
    if (!this.answer) return;
    const { bytes, bpb, bytes_per_token: sizes, signs } = this.answer;
    const parts = [`${bytes.toLocaleString("en")} bytes`, `${number(bpb, 3)} bits per byte`];
    if (sizes.length) parts.push(`${sizes.map((one) => number(one, 2)).join(" / ")} bytes per token`);
    this.find(".summary").textContent = parts.join(" · ");
    const own = Math.min(level, this.answer.levels);
    this.signs.show(signs, own, own > 1 ? this.answer.inner_p[own - 2] : signs.p);
    this.#tokens(MORE);
  }

  /** The bytes that the answer is about, for the list of tokens. */
  set content(bytes) {
    this.bytes = bytes;
  }

  #tokens(count) {
    const list = this.find(".tokens");
    this.shownTokens = count;
    this.find("details").hidden = !this.answer?.levels;
    if (!this.find("details").open || !this.answer?.levels) return;
    const level = Math.min(Math.max(1, this.level), this.answer.levels) - 1;
    const ends = this.#ends(level);
    list.replaceChildren(...ends.slice(0, count).map((stop, place) => {
      const item = document.createElement("li");
      const bytes = stop - (ends[place - 1] ?? 0);
      item.textContent = shownBytes(this.bytes.subarray(stop - bytes, stop));
      const figures = document.createElement("small");
      figures.textContent = `${bytes} B, ${number(this.answer.token_bits[level][place], 1)} bits`;
      item.append(figures);
      return item;
    }));
    this.find("summary").textContent = `Tokens${this.answer.levels > 1 ? ` of level ${level + 1}` : ""}: ${ends.length}`;
    this.find(".further").hidden = ends.length <= count;
  }

  /** Where the tokens of a level end; the last may not have been closed. */
  #ends(level) {
    const ends = this.answer.ends[level];
    return this.answer.bytes > (ends.at(-1) ?? 0) ? [...ends, this.answer.bytes] : ends;
  }

  /** What is known of a sign, as columns of a table. */
  details(sign, grown) {
    const { columns } = grown ? this.more : this.signs;
    if (!grown && this.stale) return [this.info.name, "not computed yet"];
    if (sign >= columns.text.length || (!grown && !this.answer)) return [this.info.name];
    const parts = [this.info.name];
    parts.push(columns.p[sign] === null ? "" : `p ${columns.p[sign].toFixed(3)}`);
    parts.push(columns.bits[sign] === null ? "" : `${columns.bits[sign].toFixed(2)} bits`);
    if (!grown) {
      const last = this.signs.offset(sign + 1) - 1;
      for (let level = 0; level < this.answer.levels; level += 1) {
        const p = level ? this.answer.inner_p[level - 1][sign] : null;
        parts.push(this.#token(level, last) + (p === null ? "" : `, p ${p.toFixed(3)}`));
      }
    }
    if (columns.depth[sign] > 1) parts.push(`ends tokens of ${columns.depth[sign]} levels`);
    if (columns.depth[sign] === 1) parts.push("ends a token");
    return parts;
  }

  #token(level, byte) {
    const ends = this.#ends(level);
    const place = ends.findIndex((end) => end > byte);
    const name = this.answer.levels > 1 ? `token ${place} of level ${level + 1}` : `token ${place}`;
    return `${name}, ${ends[place] - (ends[place - 1] ?? 0)} bytes`;
  }

  /** The text is another one: what it went on with does not belong to it. */
  forget() {
    this.find(".keep").disabled = true;
  }

  /** A message of the server about how the model goes on; null: nothing is asked any more. */
  goOn(message) {
    const note = this.find(".finish");
    this.find(".more").hidden = false;
    switch (message.state) {
      case "prompt":
        this.grown = null;
        this.find(".keep").disabled = true;
        this.more.show({ text: [], size: [], p: [], bits: [], depth: [] }, 0);
        this.leftOut = message.left_out ? ` (it read the text without its first ${message.left_out.toLocaleString("en")} bytes)` : "";
        note.textContent = `goes on${this.leftOut}…`;
        return;
      case "working":
      case "done":
        this.more.grow(message.known, message.signs);
        this.grown = fromBase64(message.text);
        this.find(".keep").disabled = !this.grown.length;
        note.textContent = message.finish ? `${ENDS[message.finish]}${this.leftOut}` : `goes on${this.leftOut}…`;
        return;
      case "stopped":
        if (note.textContent.includes("…")) note.textContent = "stopped";
        return;
      default:
        note.textContent = message.error ?? STATES[message.state] ?? "";
    }
  }
}

const ENDS = { length: "as long as asked for", eos: "the model ended the text here", stop: "ended" };
