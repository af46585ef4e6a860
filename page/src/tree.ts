/**
 * Conversations as trees: every edit and every "again" is a sibling of what it replaces, nothing is overwritten.
 *
 * Not here: the screen, the network, the disk. All functions are pure; a conversation is replaced, never changed.
 * Surprising: which branch is shown is written on the parent (`chosen`), so that switching a version brings back the
 * whole branch below it as it was left.
 */

export type Role = 'user' | 'assistant';

export interface Picture {
  name: string;
  /** A data URL: `data:image/png;base64,…` */
  url: string;
}

export interface ToolCall {
  name: string;
  /** JSON as the model wrote it, which need not be valid. */
  arguments: string;
}

/** What an answer cost. Times are seconds, as the browser saw them. */
export interface Cost {
  prompt: number;
  made: number;
  cached: number;
  first: number;
  seconds: number;
  /** Tokens the model's context holds; 0 where it was not known. */
  context: number;
}

export interface Turn {
  id: string;
  /** The turn that this one follows; null at the beginning. */
  parent: string | null;
  /** The turn shown after this one, where one was chosen. */
  chosen: string | null;
  role: Role;
  text: string;
  /** Milliseconds since 1970. */
  at: number;
  pictures: Picture[];
  /** Of an answer: which model wrote it. */
  model: string;
  tools: ToolCall[];
  /** Of an answer: why it ended; '' while it is being written, and for ever where the page was closed meanwhile. */
  finish: string;
  /** What went wrong, in the server's words. */
  error: string;
  /** Of an answer that was declined or kept back: why, in the server's words. */
  refusal: string;
  cost: Cost | null;
}

export interface Sampling {
  temperature: number | null;
  top_p: number | null;
  top_k: number | null;
  min_p: number | null;
  repetition_penalty: number | null;
  max_tokens: number | null;
  seed: number | null;
  stop: string[];
}

export interface Conversation {
  id: string;
  title: string;
  created: number;
  changed: number;
  model: string;
  system: string;
  sampling: Sampling;
  turns: Turn[];
  /** The first turn that is shown. */
  chosen: string | null;
}

export const AS_THE_MODEL_HAS_IT: Sampling = {
  temperature: null,
  top_p: null,
  top_k: null,
  min_p: null,
  repetition_penalty: null,
  max_tokens: null,
  seed: null,
  stop: [],
};

let last = 0;

/** An id that no other conversation or turn of this browser has, ordered by time. */
export function fresh(): string {
  last = Math.max(last + 1, Date.now());
  const noise = Array.from(crypto.getRandomValues(new Uint8Array(6)), (byte) => byte.toString(16).padStart(2, '0'));
  return last.toString(36) + '-' + noise.join('');
}

export function conversation(model: string, system = '', sampling: Sampling = AS_THE_MODEL_HAS_IT): Conversation {
  const now = Date.now();
  return { id: fresh(), title: '', created: now, changed: now, model, system, sampling, turns: [], chosen: null };
}

export function turn(role: Role, parent: string | null, text: string, more: Partial<Turn> = {}): Turn {
  return {
    id: fresh(),
    parent,
    chosen: null,
    role,
    text,
    at: Date.now(),
    pictures: [],
    model: '',
    tools: [],
    finish: '',
    error: '',
    refusal: '',
    cost: null,
    ...more,
  };
}

/** The turns that follow `parent`, oldest first: the versions of one place in the conversation. */
export function versions(whole: Conversation, parent: string | null): Turn[] {
  return whole.turns.filter((each) => each.parent === parent);
}

/** The turns that are shown, from the first to the last. */
export function path(whole: Conversation): Turn[] {
  const below = new Map<string | null, Turn[]>();
  for (const each of whole.turns) {
    const beside = below.get(each.parent);
    if (beside) beside.push(each);
    else below.set(each.parent, [each]);
  }
  const shown: Turn[] = [];
  let chosen = whole.chosen;
  let next = below.get(null);
  while (next) {
    const wanted = chosen;
    const here: Turn | undefined = next.find((each) => each.id === wanted) ?? next.at(-1);
    if (!here) break;
    shown.push(here);
    chosen = here.chosen;
    next = below.get(here.id);
  }
  return shown;
}

/** The turns from the first one to `id`, whether they are shown or not. */
export function upTo(whole: Conversation, id: string | null): Turn[] {
  const byId = new Map(whole.turns.map((each) => [each.id, each]));
  const found: Turn[] = [];
  for (let here = id === null ? undefined : byId.get(id); here; here = here.parent === null ? undefined : byId.get(here.parent))
    found.push(here);
  return found.reverse();
}

/** `whole` with `id` shown at its place; what lies below it is shown as it was when it was last looked at. */
export function choose(whole: Conversation, id: string): Conversation {
  const wanted = whole.turns.find((each) => each.id === id);
  if (!wanted) return whole;
  if (wanted.parent === null) return { ...whole, chosen: id };
  return { ...whole, turns: whole.turns.map((each) => (each.id === wanted.parent ? { ...each, chosen: id } : each)) };
}

/** `whole` with one more turn, which is shown. */
export function add(whole: Conversation, one: Turn): Conversation {
  return choose({ ...whole, turns: [...whole.turns, one], changed: Date.now() }, one.id);
}

/** `whole` with some fields of one turn changed. */
export function change(whole: Conversation, id: string, fields: Partial<Turn>): Conversation {
  return { ...whole, turns: whole.turns.map((each) => (each.id === id ? { ...each, ...fields } : each)), changed: Date.now() };
}

/** `whole` without a turn that nothing follows. */
export function drop(whole: Conversation, id: string): Conversation {
  if (whole.turns.some((each) => each.parent === id)) return whole;
  const without = (chosen: string | null): string | null => (chosen === id ? null : chosen);
  return {
    ...whole,
    chosen: without(whole.chosen),
    turns: whole.turns.filter((each) => each.id !== id).map((each) => ({ ...each, chosen: without(each.chosen) })),
  };
}

/** `own` and the turns that only `other`, another state of the same conversation, has. */
export function joined(own: Conversation, other: Conversation): Conversation {
  const known = new Set(own.turns.map((each) => each.id));
  return { ...own, turns: [...own.turns, ...other.turns.filter((each) => !known.has(each.id))] };
}

/** A name for a conversation: the beginning of its first line, cut at a word. */
export function titled(text: string): string {
  const line = text.trim().split('\n', 1)[0]?.replace(/\s+/g, ' ') ?? '';
  const letters = Array.from(line);
  if (letters.length <= 48) return line;
  const cut = letters.slice(0, 48).join('');
  const space = cut.lastIndexOf(' ');
  return (space > 24 ? cut.slice(0, space) : cut) + '…';
}
