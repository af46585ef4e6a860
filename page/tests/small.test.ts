/** Small things: numbers as people read them, what is sent, what the engine's counters say, stitches that add up. */

import { expect, test } from 'vitest';
import { changed, complaint, models, rate } from '../src/api';
import type { Engine, EngineModel } from '../src/api';
import { bytes, count, duration, parameters, speed } from '../src/format';
import { shares } from '../src/knit';
import { AS_THE_MODEL_HAS_IT } from '../src/tree';

test('numbers', () => {
  expect([0, 7, 9.96, 3.25, 5240.4, NaN].map(count)).toEqual(['0', '7', '10', '3.3', '5,240', '–']);
  expect([512, 1100, 2.02e9, 4.25e10, 4.25e11].map(bytes)).toEqual(['512 B', '1.1 kB', '2.0 GB', '42.5 GB', '425 GB']);
  expect([0, 260_000, 1_235_814_400, 70_553_706_496, 405e9].map(parameters)).toEqual(['0', '260 K', '1.2 B', '71 B', '405 B']);
  expect([0, 0.012, 0.9999, 3.21, 59.97, 75, 7500, 200_000].map(duration)).toEqual(['0 ms', '12 ms', '1.0 s', '3.2 s', '1 min 0 s', '1 min 15 s', '2 h 5 min', '2 days 7 h']);
});

test('the speed of an answer is that of its tokens after the first', () => {
  expect(speed({ made: 101, first: 0.5, seconds: 1.5 })).toBe(100);
  expect(speed({ made: 1, first: 0.5, seconds: 0.5 })).toBe(2);
  expect(speed({ made: 0, first: 0, seconds: 1 })).toBe(0);
});

test('only what was changed is sent, 0 included', () => {
  expect(changed(AS_THE_MODEL_HAS_IT)).toEqual({});
  expect(changed({ ...AS_THE_MODEL_HAS_IT, temperature: 0, seed: 0, stop: ['x'] })).toEqual({ temperature: 0, seed: 0, stop: ['x'] });
});

test('what a refusal says', () => {
  expect(complaint({ error: { message: 'No.', remedy: 'Do.' } }, '-')).toBe('No.\nDo.');
  expect(complaint({ error: { message: 'No. Do.', remedy: 'Do.' } }, '-')).toBe('No. Do.');
  expect(complaint({ detail: 'Not Found' }, '-')).toBe('Not Found');
  for (const odd of [null, 7, [], {}, { error: 7 }, { error: { message: 7 } }]) expect(complaint(odd, '-')).toBe('-');
});

test('a list of models from any OpenAI server is understood', async () => {
  const before = globalThis.fetch;
  globalThis.fetch = () => Promise.resolve(Response.json({ data: [{ id: 'plain' }, { id: 7 }, null, { id: 'full', puna: { fits: false, why: 'Too large.', chat: false, nbytes: -1 } }] }));
  try {
    expect(await models('')).toMatchObject([
      { id: 'plain', fits: true, chat: true, sees: false, context_length: 0 },
      { id: 'full', fits: false, why: 'Too large.', chat: false, nbytes: 0 },
    ]);
  } finally {
    globalThis.fetch = before;
  }
});

test('rates are differences', () => {
  const engine = (made_tokens: number): Engine => ({
    models: [{ id: 'm', made_tokens } as EngineModel], streams: [], memory: { resident: 0, available: 0 }, uptime: 0,
  });
  const made = (one: EngineModel): number => one.made_tokens;
  expect(rate({ at: 1000, engine: engine(100) }, { at: 3000, engine: engine(500) }, 'm', made)).toBe(200);
  expect(rate({ at: 1000, engine: engine(500) }, { at: 2000, engine: engine(3) }, 'm', made)).toBe(0); // started anew
  expect(rate({ at: 1000, engine: engine(0) }, { at: 2000, engine: engine(3) }, 'other', made)).toBe(0);
});

test('stitches add up, and no part vanishes', () => {
  for (const parts of [[1, 1, 1], [0, 0, 9], [1, 100_000, 1], [141, 203, 168], [333, 333, 334], [5, 0, 1]]) {
    const given = shares(parts, 48);
    expect(given.reduce((sum, part) => sum + part, 0)).toBe(48);
    parts.forEach((part, at) => expect((given[at] ?? 0) > 0).toBe(part > 0));
  }
  expect(shares([0, 0, 0], 48)).toEqual([0, 0, 0]);
});
