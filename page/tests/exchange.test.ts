/** Files: what goes out comes back in; what comes from elsewhere is refused with the place, or is sound. */

import { expect, test } from 'vitest';
import { fileName, fromJson, isPicture, LIMITS, readSampling, toJson, toMarkdown, typedNumber, Unreadable } from '../src/exchange';
import { add, AS_THE_MODEL_HAS_IT, conversation, path, turn } from '../src/tree';
import type { Conversation } from '../src/tree';

const DOT = 'data:image/png;base64,iVBORw0KGgo=';

function sample(): Conversation {
  let whole = conversation('llama3.2:1b', 'Be *brief*.\nAlways.', { ...AS_THE_MODEL_HAS_IT, temperature: 0.5, seed: 7, stop: ['\n\n', 'END'] });
  whole = { ...whole, title: 'A <b>title</b> / ..' };
  const ask = turn('user', null, 'What is this?', { pictures: [{ name: 'dot.png', url: DOT }] });
  const one = turn('assistant', ask.id, 'A dot.', {
    model: 'llama3.2:1b', finish: 'stop', cost: { prompt: 9, made: 3, cached: 2, first: 0.1, seconds: 0.5, context: 512 },
  });
  const two = turn('assistant', ask.id, '', { model: 'x', tools: [{ name: 'look', arguments: '{"a": "```"}' }], error: 'No.', finish: 'error' });
  const three = turn('assistant', ask.id, '', { model: 'x', refusal: 'Kept back: S9.', finish: 'content_filter' });
  return add(add(add(add(whole, ask), one), three), two);
}

const withoutIds = (whole: Conversation): unknown => {
  const names = new Map([...whole.turns.map((each, at) => [each.id, 'turn ' + at] as const), [whole.id, 'whole'] as const]);
  return JSON.parse(JSON.stringify(whole), (_key, value: unknown) => (typeof value === 'string' ? (names.get(value) ?? value) : value));
};

test('a round trip keeps everything but the ids', () => {
  const whole = sample();
  const [back] = fromJson(toJson([whole]));
  expect(back && withoutIds(back)).toEqual(withoutIds(whole));
  expect(back?.id).not.toBe(whole.id);
  expect(back?.turns.some((each) => whole.turns.some((one) => one.id === each.id))).toBe(false);
  expect(back && path(back).map((each) => each.text)).toEqual(path(whole).map((each) => each.text));
});

test('a file of before, which knows of no refusals', () => {
  const [back] = fromJson(spoilt((file) => file.conversations[0].turns.forEach((each: { refusal?: string }) => delete each.refusal)));
  expect(back?.turns.map((each) => each.refusal)).toEqual(['', '', '', '']);
});

test('several, and none', () => {
  expect(fromJson(toJson([sample(), sample(), sample()]))).toHaveLength(3);
  expect(fromJson(toJson([]))).toEqual([]);
});

/** The sample as JSON, with one thing changed. */
function spoilt(how: (file: any) => void): string { // eslint-disable-line @typescript-eslint/no-explicit-any
  const file: unknown = JSON.parse(toJson([sample()]));
  how(file);
  return JSON.stringify(file);
}

test.each<[string, string, RegExp]>([
  ['not JSON', '{', /not JSON/],
  ['a list', '[]', /not an object/],
  ['null', 'null', /not an object/],
  ['another format', '{"format":"other","version":1,"conversations":[]}', /its format is not/],
  ['another version', spoilt((file) => (file.version = 2)), /another version/],
  ['an unknown field', spoilt((file) => (file.extra = 1)), /unknown here: extra/],
  ['a prototype', '{"format":"puna-conversations","version":1,"conversations":[],"__proto__":{"x":1}}', /unknown here: __proto__/],
  ['a prototype of a turn', toJson([sample()]).replace('"role": "user"', '"__proto__": {"a": 1}, "role": "user"'), /turns\[0\] has a field .* __proto__/],
  ['a missing field', spoilt((file) => delete file.conversations[0].title), /conversations\[0\]\.title is not a text/],
  ['a role', spoilt((file) => (file.conversations[0].turns[0].role = 'system')), /turns\[0\]\.role is neither/],
  ['a text that is none', spoilt((file) => (file.conversations[0].turns[0].text = { toString: 1 })), /turns\[0\]\.text is not a text/],
  ['a time', spoilt((file) => (file.conversations[0].created = 9e15)), /created is outside/],
  ['NaN', spoilt((file) => (file.conversations[0].created = null)), /created is not a number/],
  ['an id', spoilt((file) => (file.conversations[0].turns[0].id = '"><script>')), /turns\[0\]\.id is not an id/],
  ['an unknown parent', spoilt((file) => (file.conversations[0].turns[1].parent = 'nobody')), /follows an unknown one, nobody/],
  ['its own parent', spoilt((file) => (file.conversations[0].turns[0].parent = file.conversations[0].turns[0].id)), /in a circle/],
  ['a circle', spoilt((file) => (file.conversations[0].turns[0].parent = file.conversations[0].turns[1].id)), /in a circle/],
  ['an id twice', spoilt((file) => (file.conversations[0].turns[1].id = file.conversations[0].turns[0].id)), /two turns of the same id/],
  ['a choice elsewhere', spoilt((file) => (file.conversations[0].turns[1].chosen = file.conversations[0].turns[0].id)), /chosen successor/],
  ['a first that is not', spoilt((file) => (file.conversations[0].chosen = file.conversations[0].turns[1].id)), /no beginning/],
  ['a remote picture', spoilt((file) => (file.conversations[0].turns[0].pictures[0].url = 'https://example.com/x.png')), /pictures\[0\]\.url is not a PNG/],
  ['a scripted picture', spoilt((file) => (file.conversations[0].turns[0].pictures[0].url = 'data:image/svg+xml;base64,PHN2Zz4=')), /is not a PNG/],
  ['too many pictures', spoilt((file) => (file.conversations[0].turns[0].pictures = Array(17).fill({ name: '', url: DOT }))), /more than 16/],
  ['a setting out of range', spoilt((file) => (file.conversations[0].sampling.top_p = 1.5)), /sampling\.top_p is outside 0 to 1/],
  ['half a token', spoilt((file) => (file.conversations[0].sampling.max_tokens = 1.5)), /max_tokens is not a whole number/],
  ['an unknown setting', spoilt((file) => (file.conversations[0].sampling.evil = 1)), /unknown here: evil/],
  ['a stop that is none', spoilt((file) => (file.conversations[0].sampling.stop = ['a', 7])), /stop\[1\] is not a text/],
  ['a cost below nothing', spoilt((file) => (file.conversations[0].turns[1].cost.made = -1)), /cost\.made is outside/],
  ['a long title', spoilt((file) => (file.conversations[0].title = 'x'.repeat(301))), /title is longer than 300/],
  ['deep JSON', '['.repeat(100_000), /not JSON/],
  ['a deep list', '{"format":' + '['.repeat(2_000) + ']'.repeat(2_000) + ',"version":1,"conversations":[]}', /its format is not/],
])('refused: %s', (_, content, said) => {
  expect(() => fromJson(content)).toThrow(Unreadable);
  expect(() => fromJson(content)).toThrow(said);
});

test('a long chain is read, and in time', () => {
  const turns = Array.from({ length: LIMITS.turns }, (_, at) => turn(at % 2 ? 'assistant' : 'user', null, 'x', { id: 't' + at, parent: at ? 't' + (at - 1) : null }));
  const chain = { ...conversation('m'), turns: turns.reverse() }; // children first
  const [back] = fromJson(toJson([chain]));
  expect(back && path(back)).toHaveLength(LIMITS.turns);
  expect(() => fromJson(toJson([{ ...chain, turns: [...turns, turn('user', null, '')] }]))).toThrow(/more than 10000/);
});

test('Markdown shows the branch that is shown', () => {
  const text = toMarkdown(sample());
  expect(text).toBe(
    '# A <b>title</b> / ..\n\n> Be *brief*.\n> Always.\n\n## You\n\n*(picture: dot.png)*\n\nWhat is this?\n\n## x\n\nCalls `look`:\n\n````json\n{"a": "```"}\n````\n\n*(No.)*\n',
  );
});

test('file names are names', () => {
  expect(fileName('../../etc/passwd', '.md')).toBe('etc-passwd.md');
  expect(fileName('Los Andes: ¿qué tal?', '.json')).toBe('Los-Andes-qué-tal.json');
  expect(fileName('///', '.json')).toBe('conversation.json');
  expect(fileName('x'.repeat(300), '.md')).toHaveLength(63);
});

test('pictures', () => {
  expect(isPicture(DOT)).toBe(true);
  for (const url of ['data:image/svg+xml;base64,AAAA', 'data:text/html;base64,AAAA', 'data:image/png,AAAA', DOT + '"', ' ' + DOT, 'https://example.com/a.png', '']) expect(isPicture(url)).toBe(false);
});

test('settings as they are typed', () => {
  expect(typedNumber('temperature', '')).toBeNull();
  expect(typedNumber('temperature', ' 0.7 ')).toBe(0.7);
  expect(typedNumber('temperature', '0')).toBe(0);
  expect(typedNumber('temperature', 'warm')).toMatch(/Not a number/);
  expect(typedNumber('temperature', '1e999')).toMatch(/Not a number/);
  expect(typedNumber('top_k', '3.5')).toMatch(/whole/);
  expect(typedNumber('top_p', '1.1')).toMatch(/Outside 0 to 1/);
  expect(typedNumber('seed', '9007199254740993')).toMatch(/whole/); // beyond what JavaScript counts exactly
  expect(readSampling({}, 'x')).toEqual(AS_THE_MODEL_HAS_IT);
});
