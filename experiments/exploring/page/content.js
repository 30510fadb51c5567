// Text and bytes: what stands in the text field, and what models read.

const encoder = new TextEncoder();
const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
const lenient = new TextDecoder("utf-8", { ignoreBOM: true });
const CARRIAGE_RETURN = 0x0d;
const ESCAPE = /\\x([0-9a-fA-F]{2})/g;

/** The bytes of a text in UTF-8; with `escapes`, \xNN is a byte. */
export function bytesOf(text, escapes) {
  if (!escapes) return encoder.encode(text);
  const parts = [];
  let last = 0;
  for (const match of text.matchAll(ESCAPE)) {
    parts.push(encoder.encode(text.slice(last, match.index)), Uint8Array.of(parseInt(match[1], 16)));
    last = match.index + match[0].length;
  }
  parts.push(encoder.encode(text.slice(last)));
  return joined(parts);
}

/** The same as text: whether it needs escapes, and how it reads. */
export function textOf(bytes) {
  // A text field makes line feeds of carriage returns.
  if (!bytes.includes(CARRIAGE_RETURN)) {
    try {
      return { text: strict.decode(bytes), escapes: false };
    } catch {
      // It is no UTF-8.
    }
  }
  return { text: escaped(bytes), escapes: true };
}

/** Text in which what a text field cannot hold is written as \xNN, and what looks like that already is told apart. */
function escaped(bytes) {
  let text = "";
  let first = 0;
  while (first < bytes.length) {
    const stop = characterEnd(bytes, first);
    text += stop > first ? lenient.decode(bytes.subarray(first, stop)) : code(bytes[first]);
    first = Math.max(stop, first + 1);
  }
  return text;
}

const code = (byte) => `\\x${byte.toString(16).padStart(2, "0")}`;

/** The end of the character that begins there; its beginning where none does that a text field can hold. */
function characterEnd(bytes, first) {
  if (bytes[first] === CARRIAGE_RETURN) return first;
  if (bytes[first] === 0x5c && looksEscaped(bytes, first)) return first;
  const size = bytes[first] < 0x80 ? 1 : bytes[first] < 0xe0 ? 2 : bytes[first] < 0xf0 ? 3 : 4;
  try {
    strict.decode(bytes.subarray(first, first + size));
    return first + size <= bytes.length ? first + size : first;
  } catch {
    return first;
  }
}

const looksEscaped = (bytes, first) =>
  /^\\x[0-9a-fA-F]{2}$/.test(String.fromCharCode(...bytes.subarray(first, first + 4)));

/** Bytes for a screen: U+FFFD for what is no UTF-8, and controls as pictures. */
export function shownBytes(bytes) {
  return lenient.decode(bytes).replace(/[\u0000-\u001f]/g, (one) => String.fromCharCode(0x2400 + one.charCodeAt(0)))
    .replace(/[\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g, "\ufffd");
}

export function joined(parts) {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let place = 0;
  for (const part of parts) {
    whole.set(part, place);
    place += part.length;
  }
  return whole;
}

export function toBase64(bytes) {
  let binary = "";
  for (let first = 0; first < bytes.length; first += 0x8000) {
    binary += String.fromCharCode(...bytes.subarray(first, first + 0x8000));
  }
  return btoa(binary);
}

export const fromBase64 = (text) => Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
