// What is asked of the server. Addresses are relative: they may have a token in them.

const client = Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16)).join("");

async function post(what, values, signal) {
  const response = await fetch(`api/${what}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ client, ...values }),
    signal,
  });
  if (response.ok) return response;
  const found = await response.json().catch(() => ({}));
  throw new Error(found.error ?? `the server said ${response.status}`);
}

export async function models() {
  const response = await fetch("api/models");
  if (!response.ok) throw new Error(await response.text());
  return response.json();
}

/** Calls `tell` with each message, a line of JSON, as it comes. */
export async function streamed(what, values, signal, tell) {
  const response = await post(what, values, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) tell(JSON.parse(line));
  }
}

/** Has the browser save what the server writes. */
export async function save(values, name) {
  const content = await (await post("export", values)).blob();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
