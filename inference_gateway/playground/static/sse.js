// Server-sent events out of a response body (HTML standard, section 9.2.6: parsing an event stream).

/** Yields the data of each event. Comments, such as keep-alives, and fields other than data are passed over. */
export async function* eventData(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return; // an event that no empty line ended is incomplete and dropped
      pending += value;
      // A carriage return at the very end may be the first half of a line's end.
      const ready = pending.endsWith("\r") ? pending.length - 1 : pending.length;
      const lines = pending.slice(0, ready).split(/\r\n|\r|\n/);
      pending = lines.pop() + pending.slice(ready);
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line.startsWith("data: ") ? 6 : 5));
        }
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}
