/**
 * A server with the interfaces that the page speaks to and scripted answers, for the tests in a browser.
 *
 * Not Puna: nothing is computed. What is answered depends on a word in the last message (see SCRIPTS). An answer that must
 * be under way holds until the client leaves or `release()` is called, so that no test depends on how fast a machine is.
 * By hand: `node tests/page/mock.mjs [port]`.
 */

import { createServer } from 'node:http';
import { readFileSync } from 'node:fs';
import { extname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const BUILT = fileURLToPath(new URL('../../src/puna/server/page/', import.meta.url));
const KINDS = { '.html': 'text/html; charset=utf-8', '.js': 'text/javascript', '.css': 'text/css', '.svg': 'image/svg+xml', '.txt': 'text/plain' };

export const CSP =
  "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; font-src 'self'; " +
  "base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

export const MODELS = [
  ['llama3.2:3b', { context_length: 8192, nbytes: 2.02e9, loaded: true, quantization: 'Q4_K_M', parameters: 3212749888, tools: true }],
  ['llama3.2-vision:11b', { context_length: 131072, nbytes: 7.9e9, quantization: 'Q4_K_M', parameters: 10642941475, sees: true }],
  ['cria', { context_length: 512, nbytes: 1.1e6, loaded: true, quantization: 'Q8_0', parameters: 1050000, chat: false }],
  [
    'llama3.3:70b',
    {
      context_length: 131072, nbytes: 42.5e9, fits: false, quantization: 'Q4_K_M', parameters: 70553706496, tools: true,
      why: 'It needs 42.5 GB for weights and 2.7 GB for 8,192 tokens of context; 19.6 GB are to be had.',
    },
  ],
].map(([id, puna]) => ({
  id, object: 'model', created: 1700000000, owned_by: 'puna',
  puna: { loaded: false, fits: true, why: '', chat: true, tools: false, sees: false, ...puna },
}));

export const RICH = `A **Bloom filter** answers “have I seen this?” with *no* or *perhaps*, in a few bits a key.

## How it works

1. Hash each key with *k* independent functions.
2. Set those *k* bits of an array of *m*.
3. A key was seen only if *all* of its bits are set.

\`\`\`python
from hashlib import blake2b

class Bloom:
    """Says no for certain, yes perhaps."""

    def __init__(self, bits: int = 1 << 16, hashes: int = 4) -> None:
        self.bits, self.hashes = bits, hashes
        self.field = bytearray(bits // 8)

    def _places(self, key: bytes):
        for n in range(self.hashes):  # one digest a hash function
            digest = blake2b(key, digest_size=8, salt=n.to_bytes(8, "little")).digest()
            yield int.from_bytes(digest, "little") % self.bits

    def add(self, key: bytes) -> None:
        for place in self._places(key):
            self.field[place >> 3] |= 1 << (place & 7)
\`\`\`

| bits a key | best *k* | false yes |
|---:|---:|---:|
| 8 | 6 | 2.2 % |
| 10 | 7 | 0.8 % |
| 16 | 11 | 0.05 % |

> It never forgets a key, and it cannot remove one.

See [the original paper](https://dl.acm.org/doi/10.1145/362686.362692), which is \`four\` pages long.
`;

export const HOSTILE = `<script>window.hurt = 1</script>
<img src=x onerror="window.hurt = 2">
<svg onload="window.hurt=3"></svg><iframe src="javascript:parent.hurt=4"></iframe>
<style>body { display: none }</style>

[click](javascript:window.hurt=5) [data](data:text/html,<script>window.hurt=6</script>) [vb](vbscript:x) [good](https://example.com/a?b=c)
![pixel](http://127.0.0.1:1/pixel.png) ![dot](data:image/svg+xml,<svg onload=alert(1)>)

[ref]: javascript:window.hurt=7
[ref] <javascript:window.hurt=8> <https://example.com/auto> https://example.com/bare

\`\`\`html"><img src=x onerror=window.hurt=9>
<script>window.hurt = 10</script>
\`\`\`

| a | b |
|:--|--:|
| <b onclick=1>x</b> | \`<i>\` |

${'> '.repeat(60)}deep

${'_'.repeat(20000)}deeper${'_'.repeat(20000)}

The end.
`;

const STORY = ' there was a little llama who lived on the high plains. One day she saw a cloud that looked like her mother.';

/** What an answer does, by the first of these words in the last message. */
const SCRIPTS = {
  bloom: { text: RICH },
  hostile: { text: HOSTILE },
  hold: { text: 'It begins and', hold: true },
  refuse: { status: 400, error: { message: 'temperature is 9, which is above 2. Choose one from 0 to 2.', type: 'invalid_request_error', code: null, param: 'temperature' } },
  midway: { text: 'Half of it', error: { message: 'The engine stopped: out of pages. Ask again with a smaller max_tokens.', type: 'server_error', code: null, param: null } },
  broken: { text: 'Half of it', hold: true, destroy: true },
  endless: { text: 'Half of it', end: true },
  long: { text: 'Cut here', finish: 'length' },
  unsafe: { text: '', finish: 'content_filter', refusal: 'What was asked was kept back: the guard found it unsafe: S9 (Indiscriminate Weapons).' },
  decline: { text: '', refusal: 'I cannot help with that.' },
  weather: { text: '', tool: ['get_weather', '{"city": "La Paz", "unit": "celsius"}'] },
};

function engine(since) {
  const t = (Date.now() - since) / 1000;
  const made = Math.round(900 + 190 * t + 60 * Math.sin(t / 3));
  return {
    models: [{
      id: 'llama3.2:3b', kernels: 'AVX-512 BF16', kv_type: 'bf16', running: 3, waiting: 1, pages_total: 512, pages_used: 141,
      pages_cached: 203, pages_free: 168, page_tokens: 16, computed_tokens: Math.round(5200 + 400 * t), reused_tokens: 14100,
      made_tokens: made, guessed_tokens: 800, right_guesses: 610, preemptions: 2, context_length: 8192,
    }],
    streams: [
      { id: 'req-1', model: 'llama3.2:3b', key: 'team-docs', seconds: 4.2, prompt_tokens: 1204, made_tokens: 212, state: 'answering' },
      { id: 'req-2', model: 'llama3.2:3b', key: 'anna', seconds: 1.1, prompt_tokens: 310, made_tokens: 64, state: 'answering' },
      { id: 'req-3', model: 'llama3.2:3b', key: 'anna', seconds: 0.3, prompt_tokens: 2048, made_tokens: 0, state: 'reading' },
      { id: 'req-4', model: 'llama3.2:3b', key: 'batch', seconds: 0.2, prompt_tokens: 96, made_tokens: 0, state: 'waiting' },
    ],
    memory: { resident: 3.1e9, available: 16.5e9 },
    uptime: 5025 + t,
  };
}

/** Starts one. `key`: asked of every request to the API. `watch`: false has the engine's view refused. */
export async function serve({ key = '', watch = true, port = 0, pace = 0 } = {}) {
  const requests = [];
  const seen = []; // every path that was asked for
  const held = new Set();
  const since = Date.now();
  let asked = 0;

  const refuse = (response, status, message) => {
    response.writeHead(status, { 'Content-Type': 'application/json' });
    response.end(JSON.stringify({ error: { message, type: 'invalid_request_error', code: null, param: null } }));
  };
  const json = (response, body) => {
    response.writeHead(200, { 'Content-Type': 'application/json' });
    response.end(JSON.stringify(body));
  };

  async function answer(request, response, path) {
    let raw = '';
    for await (const piece of request) raw += piece;
    const body = JSON.parse(raw);
    requests.push({ path, body, key: request.headers.authorization ?? '' });
    const chat = path.includes('chat');
    const last = chat ? body.messages.at(-1).content : body.prompt;
    const said = typeof last === 'string' ? last : last.map((part) => part.text ?? '').join('');
    const word = Object.keys(SCRIPTS).find((each) => said.includes(each));
    asked += 1;
    const script = word ? SCRIPTS[word] : { text: chat ? `Answer ${asked}. You said: ${said}` : STORY };
    if (script.status) {
      response.writeHead(script.status, { 'Content-Type': 'application/json' });
      response.end(JSON.stringify({ error: script.error }));
      return;
    }
    response.writeHead(200, { 'Content-Type': 'text/event-stream' });
    const send = (choice, more = {}) =>
      response.write('data: ' + JSON.stringify({ id: 'c1', object: 'chunk', model: body.model, choices: choice ? [{ index: 0, finish_reason: null, ...choice }] : [], ...more }) + '\n\n');
    const say = (text) => send(chat ? { delta: { content: text } } : { text });
    response.write(': keep-alive\n\n');
    const words = script.text.match(/\s*\S+|\s+/g) ?? [];
    for (const each of words) {
      say(each);
      if (pace) await new Promise((resolve) => setTimeout(resolve, pace));
    }
    if (script.hold) {
      await new Promise((resolve) => {
        held.add(resolve);
        response.on('close', resolve);
      });
      if (response.destroyed) return;
      if (script.destroy) return void response.destroy();
      say(' it ends.');
    }
    if (script.tool) {
      const [name, args] = script.tool;
      send({ delta: { tool_calls: [{ index: 0, id: 'call_1', type: 'function', function: { name, arguments: '' } }] } });
      for (const letter of args) send({ delta: { tool_calls: [{ index: 0, function: { arguments: letter } }] } });
    }
    if (script.refusal && chat) send({ delta: { refusal: script.refusal } });
    if (script.error) response.write('data: ' + JSON.stringify({ error: script.error }) + '\n\n');
    if (script.error || script.end) return void response.end();
    send({ ...(chat ? { delta: {} } : { text: '' }), finish_reason: script.finish ?? (script.tool ? 'tool_calls' : 'stop') });
    const usage = { prompt_tokens: 24 + raw.length, completion_tokens: words.length, total_tokens: 24 + raw.length + words.length, prompt_tokens_details: { cached_tokens: 24 } };
    send(null, { usage });
    response.end('data: [DONE]\n\n');
  }

  const server = createServer((request, response) => {
    const { pathname } = new URL(request.url, 'http://mock');
    seen.push(pathname);
    response.setHeader('Content-Security-Policy', CSP);
    response.setHeader('X-Content-Type-Options', 'nosniff');
    if (pathname === '/' || pathname.startsWith('/page/')) {
      const name = pathname === '/' ? 'index.html' : pathname.slice('/page/'.length);
      try {
        if (!/^[\w.-]+$/.test(name)) throw new Error('no such file');
        response.writeHead(200, { 'Content-Type': KINDS[extname(name)] ?? 'application/octet-stream' });
        response.end(readFileSync(join(BUILT, name)));
      } catch {
        if (!response.headersSent) response.writeHead(404);
        response.end();
      }
      return;
    }
    if (key && request.headers.authorization !== 'Bearer ' + key)
      return refuse(response, 401, request.headers.authorization ? 'This key is not known here. Ask the owner for one.' : 'A key is needed: send it as a bearer token.');
    if (pathname === '/v1/models') return json(response, { object: 'list', data: MODELS });
    if (pathname === '/version') return json(response, { version: '0.1.0' });
    if (pathname === '/puna/engine') return watch ? json(response, engine(since)) : refuse(response, 403, 'The engine is shown to its owner.');
    if (request.method === 'POST' && /^\/v1\/(chat\/)?completions$/.test(pathname)) return void answer(request, response, pathname);
    refuse(response, 404, 'There is nothing here.');
  });
  await new Promise((resolve) => server.listen(port, '127.0.0.1', resolve));
  return {
    url: `http://127.0.0.1:${server.address().port}/`,
    requests,
    seen,
    release: () => {
      for (const each of held) each();
      held.clear();
    },
    close: () => {
      server.closeAllConnections();
      return new Promise((resolve) => server.close(resolve));
    },
  };
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const mock = await serve({ port: Number(process.argv[2] ?? 0), pace: 25 });
  console.log(mock.url);
}
