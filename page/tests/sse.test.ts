/** The reader of server-sent events gives the same for every way of cutting the same bytes. */

import { expect, test } from 'vitest';
import { answer, hear } from '../src/api';
import type { Heard } from '../src/api';
import { Events } from '../src/sse';
import { AS_THE_MODEL_HAS_IT } from '../src/tree';

const STREAM =
  ': keep-alive\n\n' +
  'data: {"a":"é\u2028🦙"}\r\n\r\n' +
  'data:two\rdata\rdata:  three\r\r' +
  'event: other\nid: 7\nretry: 5\n\n' +
  'data: four\n: between\ndata: five\n\n' +
  'data: six\r\ndata: seven\r\n\r\n' +
  'data: never ended\n';
const EVENTS = ['{"a":"é\u2028🦙"}', 'two\n\n three', 'four\nfive', 'six\nseven'];

function pushed(...pieces: Uint8Array[]): string[] {
  const events = new Events();
  return pieces.flatMap((piece) => events.push(piece));
}

test('every cut in two, and byte by byte', () => {
  const bytes = new TextEncoder().encode(STREAM);
  expect(pushed(bytes)).toEqual(EVENTS);
  for (let at = 0; at <= bytes.length; at++) expect(pushed(bytes.subarray(0, at), bytes.subarray(at))).toEqual(EVENTS);
  expect(pushed(...Array.from(bytes, (byte) => Uint8Array.of(byte)))).toEqual(EVENTS);
});

test('every cut in three of a short stream', () => {
  const bytes = new TextEncoder().encode('data: ñ\r\n\r\ndata: 🦙\n\n');
  for (let one = 0; one <= bytes.length; one++)
    for (let two = one; two <= bytes.length; two++)
      expect(pushed(bytes.subarray(0, one), bytes.subarray(one, two), bytes.subarray(two))).toEqual(['ñ', '🦙']);
});

test('broken UTF-8 is a replacement, not an exception', () => {
  expect(pushed(Uint8Array.of(0x64, 0x61, 0x74, 0x61, 0x3a, 0xff, 0x0a, 0x0a))).toEqual(['\ufffd']);
});

const START: Heard = { text: '', refusal: '', tools: [], finish: '', usage: null, error: '', done: false };
const heardAll = (...chunks: unknown[]): Heard =>
  chunks.reduce<Heard>((heard, chunk) => hear(heard, typeof chunk === 'string' ? chunk : JSON.stringify(chunk)), START);

test('chunks add up to an answer', () => {
  const heard = heardAll(
    { choices: [{ index: 0, delta: { role: 'assistant', content: '' } }] },
    { choices: [{ index: 0, delta: { content: 'Hel' } }] },
    { choices: [{ index: 0, delta: { content: 'lo' }, finish_reason: null }] },
    { choices: [{ index: 0, delta: {}, finish_reason: 'stop' }] },
    { choices: [], usage: { prompt_tokens: 5, completion_tokens: 2, prompt_tokens_details: { cached_tokens: 3 } } },
    '[DONE]',
  );
  expect(heard).toEqual({ ...START, text: 'Hello', finish: 'stop', usage: { prompt: 5, made: 2, cached: 3 }, done: true });
});

test('a text that is gone on with', () => {
  expect(heardAll({ choices: [{ text: ' a' }] }, { choices: [{ text: 'b', finish_reason: 'length' }] })).toMatchObject({ text: ' ab', finish: 'length' });
});

test('tool calls in pieces', () => {
  const call = (index: number, told: object): object => ({ choices: [{ delta: { tool_calls: [{ index, function: told }] } }] });
  const heard = heardAll(call(0, { name: 'f', arguments: '' }), call(0, { arguments: '{"x"' }), call(0, { arguments: ':1}' }), call(1, { name: 'g', arguments: '{}' }), call(9, { name: 'far' }));
  expect(heard.tools).toEqual([{ name: 'f', arguments: '{"x":1}' }, { name: 'g', arguments: '{}' }]);
});

test.each([
  ['{"error":{"message":"Out of pages.","remedy":"Ask for less."}}', 'Out of pages.\nAsk for less.'],
  ['{"error":"plain"}', 'plain'],
  ['{"error":{}}', 'The answer broke off with an error.'],
  ['not JSON', 'The server sent something that is not JSON in the middle of its answer.'],
  ['[1]', 'The server sent something that is not a chunk in its answer.'],
  ['null', 'The server sent something that is not a chunk in its answer.'],
])('an error in mid-stream: %s', (data, said) => {
  expect(hear({ ...START, text: 'kept' }, data)).toEqual({ ...START, text: 'kept', error: said });
});

test.each(['{}', '{"choices":null}', '{"choices":[7]}', '{"choices":[{"delta":"x"}]}', '{"choices":[{"delta":{"content":7}}]}', '{"usage":[]}'])(
  'what is odd but no error adds nothing: %s', (data) => expect(hear(START, data)).toEqual(START),
);

/** `fetch`, answering with these pieces; `broken`: the connection fails after them. */
async function asked(pieces: string[], broken = false): Promise<Heard[]> {
  const before = globalThis.fetch;
  const stream = new ReadableStream<Uint8Array>({
    start(controller) {
      for (const piece of pieces) controller.enqueue(new TextEncoder().encode(piece));
      if (!broken) controller.close();
    },
    pull(controller) {
      if (broken) controller.error(new TypeError('network'));
    },
  }, { highWaterMark: 0 });
  globalThis.fetch = () => Promise.resolve(new Response(stream));
  try {
    const heard: Heard[] = [];
    for await (const each of answer({ model: 'm', sampling: AS_THE_MODEL_HAS_IT, messages: [] }, '', new AbortController().signal)) heard.push(each);
    return heard;
  } finally {
    globalThis.fetch = before;
  }
}

const PIECE = 'data: {"choices":[{"delta":{"content":"half"}}]}\n\n';

test('a stream that ends without its end keeps what came and says so', async () => {
  expect((await asked([PIECE])).at(-1)).toMatchObject({ text: 'half', error: expect.stringContaining('stopped without an end') as string });
  expect((await asked([PIECE, 'data: {"choi'])).at(-1)).toMatchObject({ text: 'half', error: expect.stringContaining('incomplete') as string });
});

test('a connection that breaks keeps what came and says so', async () => {
  expect((await asked([PIECE], true)).at(-1)).toMatchObject({ text: 'half', error: expect.stringContaining('connection broke') as string });
});

test('after the end nothing more is heard', async () => {
  expect((await asked([PIECE, 'data: [DONE]\n\n' + PIECE])).at(-1)).toMatchObject({ text: 'half', done: true, error: '' });
});
