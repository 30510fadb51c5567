// A shaded text: one <span> for each sign, made when it comes near the screen.

const BLOCK = 400;
const STEPS = 20;
const MOST_BITS = 8;
// Scripts that are written from right to left: there a token ends at the left of its last sign.
const RIGHT = /^[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\u{10800}-\u{10fff}\u{1e800}-\u{1efff}]/u;

export class Signs {
  /** `moved`: told of the number of a sign that is pointed at, or moved to with keys. */
  constructor(element, moved) {
    this.element = element;
    this.columns = { text: [], size: [], p: [], bits: [], depth: [] };
    this.level = 0;
    this.here = -1;
    this.seen = new IntersectionObserver((entries) => this.#fill(entries), { rootMargin: "600px" });
    element.addEventListener("pointerover", (event) => {
      const number = event.target.dataset?.n;
      if (number !== undefined) moved(Number(number));
    });
    element.addEventListener("keydown", (event) => {
      const number = this.#destination(event);
      if (number === null || !this.count) return;
      event.preventDefault();
      moved(Math.min(this.count - 1, Math.max(0, number)));
      this.span(this.here)?.scrollIntoView({ block: "nearest" });
    });
    element.addEventListener("focus", () => {
      if (this.count) moved(Math.max(0, this.here));
    });
  }

  get count() {
    return this.columns.text.length;
  }

  /** Show other signs, with the boundaries of a level (0: of all) and the probabilities of some. */
  show(columns, level, probs = columns.p) {
    this.columns = columns;
    this.level = level;
    this.probs = probs;
    this.#from(0);
  }

  /** Replace the signs from number `known` on. */
  grow(known, columns) {
    for (const [name, values] of Object.entries(columns)) this.columns[name].splice(known, Infinity, ...values);
    this.#from(known);
  }

  /** Mark a sign; -1: none. */
  mark(number) {
    this.span(this.here)?.classList.remove("here");
    this.here = number < this.count ? number : -1;
    this.span(this.here)?.classList.add("here");
  }

  /** The element of a sign; undefined where there is none. */
  span(number) {
    const block = this.element.children[Math.floor(number / BLOCK)];
    if (number < 0 || !block) return undefined;
    this.#write(block);
    return block.children[number % BLOCK];
  }

  /** The bytes before a sign. */
  offset(number) {
    let sum = 0;
    for (let one = 0; one < number; one += 1) sum += this.columns.size[one];
    return sum;
  }

  #from(known) {
    const kept = Math.floor(known / BLOCK);
    while (this.element.children.length > kept) {
      this.seen.unobserve(this.element.lastChild);
      this.element.lastChild.remove();
    }
    for (let first = kept * BLOCK; first < this.count; first += BLOCK) {
      const block = document.createElement("span");
      block.className = "block";
      block.first = first;
      // As it will be, but without shades: it takes the same room.
      block.textContent = this.columns.text.slice(first, first + BLOCK).join("");
      this.element.append(block);
      // The first one at once: what is typed into must not flicker.
      if (first === kept * BLOCK) this.#write(block);
      else this.seen.observe(block);
    }
    this.mark(this.here);
  }

  #fill(entries) {
    for (const { isIntersecting, target } of entries) if (isIntersecting) this.#write(target);
  }

  #write(block) {
    if (block.written) return;
    block.written = true;
    this.seen.unobserve(block);
    const spans = this.columns.text.slice(block.first, block.first + BLOCK).map((text, place) => {
      const span = document.createElement("span");
      const number = block.first + place;
      span.className = this.#classes(number);
      span.dataset.n = number;
      span.textContent = text;
      return span;
    });
    block.replaceChildren(...spans);
  }

  #classes(number) {
    const { bits, depth } = this.columns;
    const p = this.probs;
    const names = [];
    if (p[number] !== null) names.push(`p${Math.round(STEPS * p[number])}`);
    if (bits[number] !== null) names.push(`c${Math.min(Math.round((STEPS * bits[number]) / MOST_BITS), STEPS)}`);
    if (this.level === 0 && depth[number]) names.push(`b${Math.min(depth[number], 3)}`);
    if (this.level > 0 && depth[number] >= this.level) names.push("b1");
    if (RIGHT.test(this.columns.text[number])) names.push("r");
    return names.join(" ");
  }

  /** Where a key leads; null where it leads nowhere. */
  #destination(event) {
    const backwards = getComputedStyle(this.element).direction === "rtl";
    const [back, on] = backwards ? ["ArrowRight", "ArrowLeft"] : ["ArrowLeft", "ArrowRight"];
    if (event.altKey || event.metaKey) return null;
    switch (event.key) {
      case on: return event.ctrlKey ? this.#token(1) : this.here + 1;
      case back: return event.ctrlKey ? this.#token(-1) : this.here - 1;
      case "ArrowDown": return this.#line(1);
      case "ArrowUp": return this.#line(-1);
      case "Home": return event.ctrlKey ? 0 : this.#lineEnd(-1);
      case "End": return event.ctrlKey ? this.count - 1 : this.#lineEnd(1);
      default: return null;
    }
  }

  /** The first sign of the next token, or of this one or the one before it. */
  #token(way) {
    const begins = (number) => number <= 0 || this.columns.depth[number - 1] >= Math.max(1, this.level);
    let number = this.here + way;
    while (number > 0 && number < this.count - 1 && !begins(number)) number += way;
    return number;
  }

  #line(way) {
    const from = this.span(this.here)?.getBoundingClientRect();
    if (!from) return 0;
    let found = this.here;
    let row = null;
    for (let number = this.here + way; number >= 0 && number < this.count; number += way) {
      const box = this.span(number).getBoundingClientRect();
      const away = way * (box.top - from.top) > from.height / 2;
      if (!away) continue;
      row ??= box.top;
      if (way * (box.top - row) > from.height / 2) break;
      const nearer = (one) => Math.abs(one.left - from.left);
      if (found === this.here || nearer(box) < nearer(this.span(found).getBoundingClientRect())) found = number;
    }
    return found;
  }

  #lineEnd(way) {
    const top = this.span(this.here)?.getBoundingClientRect();
    let number = this.here;
    while (top && this.span(number + way)) {
      const box = this.span(number + way).getBoundingClientRect();
      if (Math.abs(box.top - top.top) > top.height / 2) break;
      number += way;
    }
    return number;
  }
}
