/** Branches: nothing is overwritten, and a switched version brings its whole branch back. */

import { expect, test } from 'vitest';
import { add, change, choose, conversation, drop, fresh, joined, path, titled, turn, upTo, versions } from '../src/tree';
import type { Conversation, Turn } from '../src/tree';

/** Adds turns below `parent`, each after the one before; returns the whole and the turns. */
function grown(whole: Conversation, parent: string | null, ...texts: string[]): [Conversation, Turn[]] {
  const made: Turn[] = [];
  for (const [at, text] of texts.entries()) {
    const one = turn(at % 2 ? 'assistant' : 'user', parent, text);
    whole = add(whole, one);
    parent = one.id;
    made.push(one);
  }
  return [whole, made];
}
const shown = (whole: Conversation): string => path(whole).map((each) => each.text).join(' ');
const id = (turns: Turn[], at: number): string => turns[at]?.id ?? 'missing';

test('a straight conversation', () => {
  const [whole, turns] = grown(conversation('m'), null, 'a', 'b', 'c', 'd');
  expect(shown(whole)).toBe('a b c d');
  expect(upTo(whole, id(turns, 2)).map((each) => each.text)).toEqual(['a', 'b', 'c']);
  expect(upTo(whole, null)).toEqual([]);
  expect(upTo(whole, 'unknown')).toEqual([]);
});

test('an edit in the middle is a branch; the old one comes back as it was', () => {
  let [whole, turns] = grown(conversation('m'), null, 'a', 'b', 'c', 'd', 'e');
  const parent = id(turns, 1);
  const [next, edited] = grown(whole, parent, 'C', 'D');
  whole = next;
  expect(shown(whole)).toBe('a b C D');
  expect(versions(whole, parent).map((each) => each.text)).toEqual(['c', 'C']);
  whole = choose(whole, id(turns, 2));
  expect(shown(whole)).toBe('a b c d e');
  // a second answer within the old branch, then to and fro
  const again = turn('assistant', id(turns, 2), 'd2');
  whole = add(whole, again);
  expect(shown(whole)).toBe('a b c d2');
  whole = choose(choose(whole, id(edited, 0)), id(turns, 2));
  expect(shown(whole)).toBe('a b c d2');
  whole = choose(whole, id(turns, 3));
  expect(shown(whole)).toBe('a b c d e');
});

test('the first message has versions too', () => {
  let [whole, turns] = grown(conversation('m'), null, 'a', 'b');
  whole = add(whole, turn('user', null, 'A'));
  expect(shown(whole)).toBe('A');
  whole = choose(whole, id(turns, 0));
  expect(shown(whole)).toBe('a b');
  expect(choose(whole, 'unknown')).toBe(whole);
});

test('a conversation is replaced, never changed', () => {
  const [whole, turns] = grown(conversation('m'), null, 'a', 'b');
  const before = JSON.stringify(whole);
  change(whole, id(turns, 1), { text: 'x' });
  add(whole, turn('user', id(turns, 1), 'c'));
  drop(whole, id(turns, 1));
  choose(whole, id(turns, 0));
  expect(JSON.stringify(whole)).toBe(before);
});

test('a turn that nothing follows can be dropped, another cannot', () => {
  const [whole, turns] = grown(conversation('m'), null, 'a', 'b');
  expect(shown(drop(whole, id(turns, 1)))).toBe('a');
  expect(path(drop(whole, id(turns, 1)))[0]?.chosen).toBeNull();
  expect(drop(whole, id(turns, 0))).toBe(whole);
});

test('two states of a conversation are joined without losing a turn', () => {
  const [whole, turns] = grown(conversation('m'), null, 'a', 'b');
  const here = change(add(whole, turn('user', id(turns, 1), 'here')), id(turns, 1), { text: 'B' });
  const there = add(whole, turn('user', id(turns, 1), 'there'));
  const both = joined(here, there);
  expect(versions(both, id(turns, 1)).map((each) => each.text)).toEqual(['here', 'there']);
  expect(shown(both)).toBe('a B here');
});

test('ids differ and are in the order of time', () => {
  const ids = Array.from({ length: 1000 }, fresh);
  expect(new Set(ids).size).toBe(1000);
  expect(ids.map((each) => each.split('-')[0]).sort()).toEqual(ids.map((each) => each.split('-')[0]));
});

test('titles', () => {
  expect(titled('  Hello\nworld')).toBe('Hello');
  expect(titled('word '.repeat(20))).toBe('word word word word word word word word word…');
  expect(Array.from(titled('🦙'.repeat(60)))).toHaveLength(49);
  expect(titled('')).toBe('');
});
