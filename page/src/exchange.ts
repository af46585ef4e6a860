/**
 * Conversations as files: JSON, which comes back in as it went out, and Markdown, for reading.
 *
 * A file from elsewhere is hostile until checked: every field by name, type and size; the tree must be one (each parent
 * known, none its own ancestor); pictures are data URLs of four kinds. An unknown field is refused by name, since what
 * is not understood cannot be kept. Surprising: what comes in gets new ids, so that an import never overwrites.
 */

import { AS_THE_MODEL_HAS_IT, fresh, path } from './tree';
import type { Conversation, Cost, Picture, Sampling, ToolCall, Turn } from './tree';

export const FORMAT = 'puna-conversations';
export const LIMITS = {
  /** Of a file, in bytes: pictures take most of them. */
  file: 256e6,
  conversations: 5_000,
  turns: 10_000,
  /** Of one text, in UTF-16 units. */
  text: 4_000_000,
  pictures: 16,
  /** Of one picture's data URL. */
  picture: 16_000_000,
};

/** A file is not what it should be; the message names the place. */
export class Unreadable extends Error {}

type Fields = Record<string, unknown>;

function object(value: unknown, where: string, known: readonly string[]): Fields {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) throw new Unreadable(`${where} is not an object.`);
  for (const name of Object.keys(value))
    if (!known.includes(name)) throw new Unreadable(`${where} has a field that is unknown here: ${name.slice(0, 60)}.`);
  return value as Fields;
}

function text(value: unknown, where: string, longest = LIMITS.text): string {
  if (typeof value !== 'string') throw new Unreadable(`${where} is not a text.`);
  if (value.length > longest) throw new Unreadable(`${where} is longer than ${longest} characters.`);
  return value;
}

function number(value: unknown, where: string, least = -Number.MAX_SAFE_INTEGER, most = Number.MAX_SAFE_INTEGER): number {
  if (typeof value !== 'number' || !Number.isFinite(value)) throw new Unreadable(`${where} is not a number.`);
  if (value < least || value > most) throw new Unreadable(`${where} is outside ${least} to ${most}.`);
  return value;
}

function list(value: unknown, where: string, most: number): unknown[] {
  if (!Array.isArray(value)) throw new Unreadable(`${where} is not a list.`);
  if (value.length > most) throw new Unreadable(`${where} has more than ${most} entries.`);
  return value;
}

function id(value: unknown, where: string): string {
  const found = text(value, where, 64);
  if (!/^[\w-]+$/.test(found)) throw new Unreadable(`${where} is not an id: letters, digits, - and _.`);
  return found;
}

const idOrNull = (value: unknown, where: string): string | null => (value === null ? null : id(value, where));

/** The data URL of a picture that a model may be shown; false for anything else, SVG included. */
export function isPicture(url: string): boolean {
  return /^data:image\/(?:png|jpeg|webp|gif);base64,[A-Za-z0-9+/]+={0,2}$/.test(url);
}

function readPicture(value: unknown, where: string): Picture {
  const fields = object(value, where, ['name', 'url']);
  const url = text(fields['url'], where + '.url', LIMITS.picture);
  if (!isPicture(url)) throw new Unreadable(`${where}.url is not a PNG, JPEG, WebP or GIF as a data URL.`);
  return { name: text(fields['name'], where + '.name', 300), url };
}

function readCost(value: unknown, where: string): Cost | null {
  if (value === null) return null;
  const fields = object(value, where, ['prompt', 'made', 'cached', 'first', 'seconds', 'context']);
  const of = (name: keyof Cost): number => number(fields[name], `${where}.${name}`, 0, 1e12);
  return { prompt: of('prompt'), made: of('made'), cached: of('cached'), first: of('first'), seconds: of('seconds'), context: of('context') };
}

/** What each setting may be. The server has the last word; this keeps out what no server takes. */
export const RANGES: Record<Exclude<keyof Sampling, 'stop'>, { least: number; most: number; step: number }> = {
  temperature: { least: 0, most: 5, step: 0.1 },
  top_p: { least: 0, most: 1, step: 0.05 },
  top_k: { least: 0, most: 1_000_000, step: 1 },
  min_p: { least: 0, most: 1, step: 0.01 },
  repetition_penalty: { least: 0.01, most: 10, step: 0.05 },
  max_tokens: { least: 1, most: 100_000_000, step: 1 },
  seed: { least: 0, most: Number.MAX_SAFE_INTEGER, step: 1 },
};

export type Numeric = keyof typeof RANGES;

/** What was typed, as a number in range; null where it is empty, a sentence where it is neither. */
export function typedNumber(name: Numeric, typed: string): number | null | string {
  if (typed.trim() === '') return null;
  const value = Number(typed);
  const { least, most, step } = RANGES[name];
  if (!Number.isFinite(value)) return 'Not a number, so it is not sent.';
  if (step === 1 && !Number.isSafeInteger(value)) return 'Not a whole number, so it is not sent.';
  if (value < least || value > most) return `Outside ${least} to ${most}, so it is not sent.`;
  return value;
}

export function readSampling(value: unknown, where: string): Sampling {
  const fields = object(value, where, Object.keys(AS_THE_MODEL_HAS_IT));
  const read: Sampling = { ...AS_THE_MODEL_HAS_IT };
  for (const [name, { least, most, step }] of Object.entries(RANGES)) {
    const found = fields[name];
    if (found === null || found === undefined) continue;
    const checked = number(found, `${where}.${name}`, least, most);
    if (step === 1 && !Number.isInteger(checked)) throw new Unreadable(`${where}.${name} is not a whole number.`);
    read[name as keyof typeof RANGES] = checked;
  }
  read.stop = list(fields['stop'] ?? [], where + '.stop', 64).map((each, at) => text(each, `${where}.stop[${at}]`, 1_000));
  return read;
}

function readTurn(value: unknown, where: string): Turn {
  const fields = object(value, where, [
    'id', 'parent', 'chosen', 'role', 'text', 'at', 'pictures', 'model', 'tools', 'finish', 'error', 'refusal', 'cost',
  ]);
  const role = text(fields['role'], where + '.role', 20);
  if (role !== 'user' && role !== 'assistant') throw new Unreadable(`${where}.role is neither user nor assistant.`);
  return {
    id: id(fields['id'], where + '.id'),
    parent: idOrNull(fields['parent'], where + '.parent'),
    chosen: idOrNull(fields['chosen'], where + '.chosen'),
    role,
    text: text(fields['text'], where + '.text'),
    at: number(fields['at'], where + '.at', 0, 8.64e15),
    pictures: list(fields['pictures'], where + '.pictures', LIMITS.pictures).map((each, at) =>
      readPicture(each, `${where}.pictures[${at}]`),
    ),
    model: text(fields['model'], where + '.model', 300),
    tools: list(fields['tools'], where + '.tools', 128).map((each, at): ToolCall => {
      const call = object(each, `${where}.tools[${at}]`, ['name', 'arguments']);
      return { name: text(call['name'], `${where}.tools[${at}].name`), arguments: text(call['arguments'], `${where}.tools[${at}].arguments`) };
    }),
    finish: text(fields['finish'], where + '.finish', 100),
    error: text(fields['error'], where + '.error', 100_000),
    refusal: text(fields['refusal'] ?? '', where + '.refusal', 100_000), // which files of before do not have
    cost: readCost(fields['cost'], where + '.cost'),
  };
}

/** Whether every turn is reached from the beginning: no unknown parent, no circle, no id twice. */
function checkTree(turns: readonly Turn[], chosen: string | null, where: string): void {
  const known = new Map<string, Turn>();
  for (const each of turns) {
    if (known.has(each.id)) throw new Unreadable(`${where} has two turns of the same id, ${each.id}.`);
    known.set(each.id, each);
  }
  const sound = new Set<string | null>([null]);
  for (const each of turns) {
    const walk: string[] = [];
    let here: Turn | undefined = each;
    while (here && !sound.has(here.id)) {
      if (walk.length > turns.length) throw new Unreadable(`${where} has turns that follow one another in a circle.`);
      walk.push(here.id);
      if (here.parent !== null && !known.has(here.parent))
        throw new Unreadable(`${where} has a turn that follows an unknown one, ${here.parent}.`);
      here = here.parent === null ? undefined : known.get(here.parent);
    }
    for (const step of walk) sound.add(step);
    if (each.chosen !== null && known.get(each.chosen)?.parent !== each.id)
      throw new Unreadable(`${where} has a turn whose chosen successor does not follow it.`);
  }
  if (chosen !== null && known.get(chosen)?.parent !== null) throw new Unreadable(`${where}.chosen is no beginning.`);
}

export function readConversation(value: unknown, where: string): Conversation {
  const fields = object(value, where, ['id', 'title', 'created', 'changed', 'model', 'system', 'sampling', 'turns', 'chosen']);
  const turns = list(fields['turns'], where + '.turns', LIMITS.turns).map((each, at) => readTurn(each, `${where}.turns[${at}]`));
  const chosen = idOrNull(fields['chosen'], where + '.chosen');
  checkTree(turns, chosen, where);
  return {
    id: id(fields['id'], where + '.id'),
    title: text(fields['title'], where + '.title', 300),
    created: number(fields['created'], where + '.created', 0, 8.64e15),
    changed: number(fields['changed'], where + '.changed', 0, 8.64e15),
    model: text(fields['model'], where + '.model', 300),
    system: text(fields['system'], where + '.system'),
    sampling: readSampling(fields['sampling'], where + '.sampling'),
    turns,
    chosen,
  };
}

export function toJson(which: readonly Conversation[]): string {
  return JSON.stringify({ format: FORMAT, version: 1, conversations: which }, null, 1) + '\n';
}

/** The conversations in a file, with new ids. Throws `Unreadable`, naming the place. */
export function fromJson(content: string): Conversation[] {
  if (content.length > LIMITS.file) throw new Unreadable(`The file is larger than ${LIMITS.file / 1e6} MB.`);
  let parsed: unknown;
  try {
    parsed = JSON.parse(content);
  } catch {
    throw new Unreadable('The file is not JSON. Only what “Export as JSON” wrote can be read back.');
  }
  const fields = object(parsed, 'The file', ['format', 'version', 'conversations']);
  if (fields['format'] !== FORMAT) throw new Unreadable('The file holds no conversations of this page: its format is not ' + FORMAT + '.');
  if (fields['version'] !== 1) throw new Unreadable('The file is of another version than 1, which is all that this page reads.');
  return list(fields['conversations'], 'conversations', LIMITS.conversations).map((each, at) =>
    renamed(readConversation(each, `conversations[${at}]`)),
  );
}

function renamed(read: Conversation): Conversation {
  const names = new Map(read.turns.map((each) => [each.id, fresh()]));
  const of = (old: string | null): string | null => (old === null ? null : (names.get(old) ?? null));
  return {
    ...read,
    id: fresh(),
    chosen: of(read.chosen),
    turns: read.turns.map((each) => ({ ...each, id: names.get(each.id) ?? fresh(), parent: of(each.parent), chosen: of(each.chosen) })),
  };
}

/** The shown branch, for reading. Pictures are named, not carried along. */
export function toMarkdown(whole: Conversation): string {
  const lines = ['# ' + (whole.title || 'A conversation'), ''];
  if (whole.system) lines.push(...whole.system.split('\n').map((line) => ('> ' + line).trimEnd()), '');
  for (const each of path(whole)) {
    lines.push('## ' + (each.role === 'user' ? 'You' : each.model || 'Answer'), '');
    for (const one of each.pictures) lines.push(`*(picture: ${one.name})*`, '');
    if (each.text) lines.push(each.text, '');
    for (const call of each.tools) {
      const fence = '`'.repeat(Math.max(3, ...Array.from(call.arguments.matchAll(/`+/g), (run) => run[0].length + 1)));
      lines.push(`Calls \`${call.name}\`:`, '', fence + 'json', call.arguments, fence, '');
    }
    if (each.refusal) lines.push(`*(${each.refusal})*`, '');
    if (each.error) lines.push(`*(${each.error})*`, '');
  }
  return lines.join('\n').trimEnd() + '\n';
}

/** A file name from a title: nothing that a file system could take for more than a name. */
export function fileName(title: string, ending: string): string {
  const plain = title.normalize('NFC').replace(/[^\p{L}\p{M}\p{N}]+/gu, '-').replace(/^-+|-+$/g, '').slice(0, 60);
  return (plain || 'conversation') + ending;
}
