/**
 * Server-sent events (WHATWG HTML, section 9.2), read from bytes as they come.
 *
 * What it is not: EventSource, which can only GET. Only the data of each event is kept: our protocol has no names and
 * no ids. Surprising: bytes may be cut anywhere, within a letter or between the CR and LF of one line end, and every way
 * of cutting gives the same events.
 */

export class Events {
  private readonly decoder = new TextDecoder('utf-8');
  private rest = '';
  private data: string[] = [];
  /** The last letter was a CR, which ended a line: an LF that comes next belongs to it. */
  private afterCr = false;

  /** The data of each event that ended within these bytes. */
  push(bytes: Uint8Array): string[] {
    return this.read(this.decoder.decode(bytes, { stream: true }));
  }

  private read(text: string): string[] {
    const done: string[] = [];
    if (text === '') return done;
    if (this.afterCr && text.startsWith('\n')) text = text.slice(1);
    this.afterCr = text === '' ? false : text.endsWith('\r');
    const lines = (this.rest + text).split(/\r\n|\r|\n/);
    this.rest = lines.pop() ?? '';
    for (const line of lines) {
      if (line === '') {
        if (this.data.length > 0) done.push(this.data.join('\n'));
        this.data = [];
        continue;
      }
      const colon = line.indexOf(':');
      const field = colon < 0 ? line : line.slice(0, colon);
      if (field !== 'data') continue; // a comment begins with the colon, so its field is ''
      const value = colon < 0 ? '' : line.slice(colon + 1);
      this.data.push(value.startsWith(' ') ? value.slice(1) : value);
    }
    return done;
  }
}
