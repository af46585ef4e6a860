/**
 * What the page knows, as signals, and everything a person can do with it.
 *
 * Not here: how it looks (parts/), what a tree of turns is (tree.ts), how an answer is read (api.ts). Surprising: a new
 * conversation is on no list and on no disk until something was said in it.
 */

import { batch, computed, effect, signal } from '@preact/signals';
import * as api from './api';
import type { Engine, Heard, Message, Model } from './api';
import { fileName, fromJson, LIMITS, readSampling, toJson, toMarkdown, Unreadable } from './exchange';
import { Shelf } from './storage';
import { add, AS_THE_MODEL_HAS_IT, change, choose, conversation, drop, joined, path, titled, turn, upTo } from './tree';
import type { Conversation, Picture, Sampling, Turn } from './tree';

export type Panel = 'none' | 'settings' | 'engine';
export type Dialog = 'none' | 'models' | 'keys' | 'key';
export type Theme = 'system' | 'light' | 'dark';

const blank = signal<Conversation>(conversation(''));
const kept = signal<Conversation[]>([]);
const current = signal(blank.value.id);

export const models = signal<Model[]>([]);
/** Why there are no models to choose from; '' where there are, null while they are asked for. */
export const modelsTrouble = signal<string | null>(null);
export const running = signal<ReadonlyMap<string, string>>(new Map());
export const panel = signal<Panel>('none');
export const dialog = signal<Dialog>('none');
export const sidebar = signal(false);
/** A sentence that is shown for a while. */
export const notice = signal('');
/** What a screen reader is told. */
export const spoken = signal('');
export const lasting = signal(true);
export const serverVersion = signal('');
export const mayWatch = signal(false);
export const keyTrouble = signal('');
export const theme = signal<Theme>('system');
/** The turn being rewritten. */
export const editing = signal<string | null>(null);

export const conversations = computed(() => [...kept.value].sort((one, other) => other.changed - one.changed));
export const shown = computed(() => kept.value.find((each) => each.id === current.value) ?? blank.value);
export const shownPath = computed(() => path(shown.value));
export const model = computed<Model | null>(() => {
  const served = models.value;
  const wanted = served.find((each) => each.id === shown.value.model);
  return wanted ?? served.find((each) => each.id === preferred()) ?? served.find((each) => each.loaded) ?? served.find((each) => each.fits) ?? null;
});
export const busy = computed(() => running.value.has(shown.value.id));

// ---- small things that are remembered ------------------------------------------------------------------------------

const NAMES = { key: 'puna.key', theme: 'puna.theme', model: 'puna.model', defaults: 'puna.defaults', sidebar: 'puna.sidebar' };

function remember(name: string, value: string): void {
  try {
    if (value) localStorage.setItem(name, value);
    else localStorage.removeItem(name);
  } catch {
    lasting.value = false; // the browser keeps nothing here; the page says so
  }
}

function recall(name: string): string {
  try {
    return localStorage.getItem(name) ?? '';
  } catch {
    return '';
  }
}

const preferred = (): string => recall(NAMES.model);

let key = '';
export const keyed = signal(false);

export function setTheme(wanted: Theme): void {
  theme.value = wanted;
  remember(NAMES.theme, wanted === 'system' ? '' : wanted);
}

interface Defaults {
  system: string;
  sampling: Sampling;
}

function defaults(): Defaults {
  const found = recall(NAMES.defaults);
  if (found) {
    try {
      const parsed = JSON.parse(found) as { system?: unknown; sampling?: unknown };
      if (typeof parsed.system === 'string') return { system: parsed.system, sampling: readSampling(parsed.sampling, 'sampling') };
    } catch (error) {
      console.warn('The settings for new conversations cannot be read.', error);
    }
  }
  return { system: '', sampling: AS_THE_MODEL_HAS_IT };
}

/** Has new conversations begin with the settings of this one. */
export function keepAsDefaults(): void {
  const { system, sampling } = shown.value;
  remember(NAMES.defaults, JSON.stringify({ system, sampling }));
  tell('New conversations begin with these settings.');
}

let noticeTimer = 0;
export function tell(sentence: string): void {
  notice.value = sentence;
  spoken.value = sentence;
  clearTimeout(noticeTimer);
  noticeTimer = window.setTimeout(() => (notice.value = ''), 6000);
}

// ---- keeping -------------------------------------------------------------------------------------------------------

let shelf: Shelf | null = null;
const unsaved = new Set<string>();
/** Turns that were taken away here, and must not come back from the disk. */
const dropped = new Set<string>();
let saving = 0;
const others = 'BroadcastChannel' in globalThis ? new BroadcastChannel('puna') : null;

async function save(): Promise<void> {
  clearTimeout(saving);
  saving = 0;
  const which = kept.value.filter((each) => unsaved.has(each.id));
  unsaved.clear();
  if (which.length === 0 || !shelf) return;
  try {
    await shelf.keep(which, dropped);
    for (const each of which) others?.postMessage({ kept: each.id });
  } catch (error) {
    console.error(error);
    tell('The browser could not keep this conversation: its storage may be full. Export it to have it.');
  }
}

function saveSoon(id: string): void {
  unsaved.add(id);
  if (!saving) saving = window.setTimeout(() => void save(), 400);
}

/** Another tab changed something. */
others?.addEventListener('message', (event: MessageEvent<{ kept?: string; gone?: string }>) => {
  const { kept: id, gone } = event.data;
  if (gone) kept.value = kept.value.filter((each) => each.id !== gone);
  if (!id) return;
  void shelf?.one(id).then((found) => {
    if (!found) return;
    const own = kept.value.find((each) => each.id === id);
    // Where an answer comes in here, or something is not kept yet, what is here is newer.
    const next = own && (running.value.has(id) || unsaved.has(id)) ? joined(own, found) : found;
    kept.value = [...kept.value.filter((each) => each.id !== id), next];
  });
});

function update(id: string, how: (before: Conversation) => Conversation): void {
  if (blank.value.id === id) blank.value = how(blank.value);
  else {
    kept.value = kept.value.map((each) => (each.id === id ? how(each) : each));
    saveSoon(id);
  }
}

// ---- conversations -------------------------------------------------------------------------------------------------

export function begin(): void {
  const { system, sampling } = defaults();
  batch(() => {
    editing.value = null;
    blank.value = conversation('', system, sampling); // whichever model was last chosen
    current.value = blank.value.id;
    sidebar.value = false;
  });
  if (location.hash) history.pushState(null, '', location.pathname);
}

export function open(id: string): void {
  if (!kept.value.some((each) => each.id === id)) return;
  batch(() => {
    editing.value = null;
    current.value = id;
    sidebar.value = false;
  });
  if (location.hash !== '#' + id) location.hash = id;
}

export function rename(id: string, title: string): void {
  const wanted = title.trim().slice(0, 300);
  if (wanted) update(id, (before) => ({ ...before, title: wanted }));
}

export function remove(id: string): void {
  stop(id);
  const gone = kept.value.find((each) => each.id === id);
  kept.value = kept.value.filter((each) => each.id !== id);
  unsaved.delete(id);
  if (current.value === id) begin();
  void shelf?.forget(id).then(() => others?.postMessage({ gone: id }));
  if (gone) tell(`“${gone.title}” is deleted.`);
}

/** Conversations in which every word of `wanted` occurs, in the title or in what was said. */
export function found(wanted: string): Conversation[] {
  const words = wanted.toLowerCase().split(/\s+/).filter(Boolean);
  if (words.length === 0) return conversations.value;
  return conversations.value.filter((each) => {
    const text = [each.title, ...each.turns.map((one) => one.text)].join('\n').toLowerCase();
    return words.every((word) => text.includes(word));
  });
}

export function setSystem(system: string): void {
  update(shown.value.id, (before) => ({ ...before, system }));
}

export function setSampling(sampling: Sampling): void {
  update(shown.value.id, (before) => ({ ...before, sampling }));
}

export function setModel(id: string): void {
  remember(NAMES.model, id);
  update(shown.value.id, (before) => ({ ...before, model: id }));
}

export function show(id: string): void {
  update(shown.value.id, (before) => choose(before, id));
  void save();
}

// ---- files ---------------------------------------------------------------------------------------------------------

function download(name: string, kind: string, content: string): void {
  const url = URL.createObjectURL(new Blob([content], { type: kind }));
  const link = document.createElement('a');
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

export function exportJson(which: Conversation[]): void {
  const only = which.length === 1 ? which[0] : undefined;
  download(fileName(only ? only.title : 'puna-conversations', '.json'), 'application/json', toJson(which));
}

export function exportMarkdown(which: Conversation): void {
  download(fileName(which.title, '.md'), 'text/markdown', toMarkdown(which));
}

export async function importFile(file: File): Promise<void> {
  try {
    if (file.size > LIMITS.file) throw new Unreadable(`The file is larger than ${LIMITS.file / 1e6} MB.`);
    const read = fromJson(await file.text());
    await shelf?.keep(read);
    kept.value = [...kept.value, ...read];
    tell(read.length === 1 ? 'One conversation is imported.' : `${read.length} conversations are imported.`);
    const first = read[0];
    if (read.length === 1 && first) open(first.id);
  } catch (error) {
    if (error instanceof Unreadable) tell('Nothing is imported. ' + error.message);
    else {
      console.error(error);
      tell('Nothing is imported: the browser could not keep it.');
    }
  }
}

// ---- the server ----------------------------------------------------------------------------------------------------

function askForKey(why: string): void {
  keyTrouble.value = why;
  dialog.value = 'key';
}

/** What to do again once there is a key. */
let afterKey: (() => void) | null = null;

export function useKey(wanted: string, lastingly: boolean): void {
  if (!/^[\x21-\x7e]+$/.test(wanted.trim())) {
    keyTrouble.value = 'A key has only letters, digits and signs that every keyboard has, and no spaces within.';
    return;
  }
  key = wanted.trim();
  keyed.value = key !== '';
  try {
    sessionStorage.setItem(NAMES.key, key);
  } catch {
    lasting.value = false; // then the key lives as long as the page
  }
  remember(NAMES.key, lastingly ? key : '');
  dialog.value = 'none';
  const again = afterKey;
  afterKey = null;
  void connect().then(() => again?.());
}

export function forgetKey(): void {
  key = '';
  keyed.value = false;
  try {
    sessionStorage.removeItem(NAMES.key);
  } catch {
    lasting.value = false;
  }
  remember(NAMES.key, '');
  tell('The key is forgotten.');
  void connect();
}

export async function connect(): Promise<void> {
  try {
    const served = await api.models(key);
    models.value = served;
    modelsTrouble.value = served.length ? '' : 'This server has no model yet. Start it with one: puna serve MODEL';
  } catch (error) {
    if (!(error instanceof api.Refused)) throw error;
    modelsTrouble.value = error.message;
    if (error.status === 401) askForKey(key ? error.message : '');
    mayWatch.value = false;
    return;
  }
  try {
    await api.engine(key);
    mayWatch.value = true;
  } catch (error) {
    if (!(error instanceof api.Refused)) throw error;
    mayWatch.value = false; // the view is the owner's, or this server has none
    if (panel.value === 'engine') panel.value = 'none';
  }
  try {
    serverVersion.value = await api.version(key);
  } catch (error) {
    if (!(error instanceof api.Refused)) throw error;
    serverVersion.value = ''; // it is only shown
  }
}

export const lookAtEngine = (): Promise<Engine> => api.engine(key);

/** The page is being closed or left. */
let leaving = false;

const stops = new Map<string, AbortController>();

export function stop(id = shown.value.id): void {
  stops.get(id)?.abort();
}

function messages(whole: Conversation, turns: readonly Turn[], sees: boolean): Message[] {
  const said: Message[] = whole.system ? [{ role: 'system', content: whole.system }] : [];
  for (const each of turns) {
    const content = each.text || each.tools.map((call) => JSON.stringify({ name: call.name, arguments: call.arguments })).join('\n');
    if (each.refusal && content === '') said.push({ role: each.role, content: null, refusal: each.refusal });
    else if (each.pictures.length > 0 && sees)
      said.push({
        role: each.role,
        content: [
          ...each.pictures.map((one) => ({ type: 'image_url' as const, image_url: { url: one.url } })),
          { type: 'text' as const, text: content },
        ],
      });
    else said.push({ role: each.role, content });
  }
  return said;
}

/** Whether a model cannot see what it would be shown, which is then told. */
function blind(asked: Model, shownTo: readonly { pictures: Picture[] }[]): boolean {
  if (asked.sees || shownTo.every((each) => each.pictures.length === 0)) return false;
  tell(`${asked.id} does not see pictures. Choose a model that does, or edit the message and take them away.`);
  return true;
}

/** Has the shown model answer after `parent`, as a new version where there is an answer already. */
export async function answerAfter(id: string, parent: string): Promise<void> {
  const asked = model.value;
  const whole = kept.value.find((each) => each.id === id);
  if (!whole || running.value.has(id)) return;
  if (!asked) {
    tell(modelsTrouble.value ?? 'The server has not said yet which models it has.');
    return;
  }
  const before = upTo(whole, parent);
  if (blind(asked, before)) return;
  const made = turn('assistant', parent, '', { model: asked.id });
  const control = new AbortController();
  stops.set(id, control);
  batch(() => {
    update(id, (one) => add(one, made));
    running.value = new Map(running.value).set(id, made.id);
    spoken.value = asked.id + ' is answering.';
  });
  const started = performance.now();
  const since = (): number => (performance.now() - started) / 1000;
  let first = 0;
  let next = 0;
  let heard: Heard | null = null;
  const write = (fields: Partial<Turn>): void => update(id, (one) => change(one, made.id, fields));
  const question = asked.chat
    ? { messages: messages(whole, before, asked.sees) }
    : { prompt: before.map((each) => each.text).join('') };
  let finish = '';
  let error = '';
  try {
    for await (heard of api.answer({ model: asked.id, sampling: whole.sampling, ...question }, key, control.signal)) {
      if (!first && (heard.text || heard.refusal || heard.tools.length)) first = since();
      const before = performance.now();
      if (before < next) continue;
      write({ text: heard.text, refusal: heard.refusal, tools: heard.tools });
      await new Promise((drawn) => setTimeout(drawn));
      next = performance.now() + 40 + 4 * (performance.now() - before); // drawing takes a fifth of the time at most
    }
    finish = heard?.finish || (heard?.error ? 'error' : 'stop');
    error = heard?.error ?? '';
  } catch (caught) {
    if (control.signal.aborted) finish = 'stopped';
    else if (caught instanceof api.Refused) {
      finish = 'error';
      error = caught.message;
      if (caught.status === 401) {
        afterKey = () => void again(id, made.id); // which takes this failed one away
        askForKey(key ? caught.message : '');
      }
    } else {
      finish = 'error';
      error = 'The page itself failed: ' + String(caught);
      console.error(caught);
    }
  }
  if (leaving) return; // the browser broke it off; what came is kept as unfinished, which it is
  const seconds = since();
  const usage = heard?.usage ?? null;
  batch(() => {
    write({
      text: heard?.text ?? '',
      refusal: heard?.refusal ?? '',
      tools: heard?.tools ?? [],
      finish,
      error,
      cost: usage && { ...usage, first: first || seconds, seconds, context: asked.context_length },
    });
    const left = new Map(running.value);
    left.delete(id);
    running.value = left;
    if (error) spoken.value = 'The answer failed. ' + error;
    else if (finish === 'stopped') spoken.value = 'Stopped.';
    else if (heard?.refusal || finish === 'content_filter') spoken.value = 'No answer. ' + (heard?.refusal ?? '');
    else spoken.value = 'The answer: ' + (heard?.text ?? '').slice(0, 1500);
  });
  stops.delete(id);
  void save();
  if (!asked.loaded) void connect(); // it is now, and another may have made room for it
}

/** Says something, in a new conversation where none is open. A base model may be asked to go on without a word. */
export function send(text: string, pictures: Picture[]): boolean {
  const whole = shown.value;
  if (running.value.has(whole.id)) return false;
  const base = model.value?.chat === false;
  const end = shownPath.value.at(-1) ?? null;
  if (!model.value) {
    tell(modelsTrouble.value ?? 'The server has not said yet which models it has.');
    return false;
  }
  if (text.trim() === '' && pictures.length === 0) {
    if (!base || !end) return false;
    void answerAfter(whole.id, end.id);
    return true;
  }
  if (blind(model.value, [...shownPath.value, { pictures }])) return false;
  const said = turn('user', end?.id ?? null, base ? text : text.trim(), { pictures });
  batch(() => {
    if (whole.id === blank.value.id) {
      const named = { ...whole, title: titled(text) || 'A picture', model: model.value?.id ?? '' };
      kept.value = [...kept.value, named];
      blank.value = conversation('');
      location.hash = whole.id;
    }
    update(whole.id, (one) => add(one, said));
  });
  void answerAfter(whole.id, said.id);
  return true;
}

/** Another version of an answer; in its place where nothing came of it. */
export async function again(id: string, answer: string): Promise<void> {
  if (running.value.has(id)) return;
  const old = kept.value.find((each) => each.id === id)?.turns.find((each) => each.id === answer);
  if (!old?.parent) return;
  if (old.error && !old.text && old.tools.length === 0) {
    dropped.add(answer);
    update(id, (before) => drop(before, answer));
  }
  await answerAfter(id, old.parent);
}

/** A new version of a turn: of a message, which is then answered; of an answer, which stands as it is written. */
export function rewrite(of: Turn, text: string, pictures: Picture[]): void {
  const id = shown.value.id;
  if (running.value.has(id)) return;
  editing.value = null;
  const made =
    of.role === 'user'
      ? turn('user', of.parent, text, { pictures })
      : turn('assistant', of.parent, text, { model: of.model, finish: 'edited' });
  update(id, (before) => add(before, made));
  if (of.role === 'user') void answerAfter(id, made.id);
}

// ---- start ---------------------------------------------------------------------------------------------------------

export async function start(): Promise<void> {
  const wanted = recall(NAMES.theme);
  if (wanted === 'light' || wanted === 'dark') theme.value = wanted;
  effect(() => {
    if (theme.value === 'system') delete document.documentElement.dataset['theme'];
    else document.documentElement.dataset['theme'] = theme.value;
  });
  effect(() => {
    document.title = shown.value.title ? shown.value.title + ' · Puna' : 'Puna';
  });
  try {
    key = sessionStorage.getItem(NAMES.key) ?? recall(NAMES.key);
  } catch {
    key = '';
  }
  keyed.value = key !== '';
  window.addEventListener('pagehide', () => {
    leaving = true;
    void save();
  });
  window.addEventListener('pageshow', () => (leaving = false));
  document.addEventListener('visibilitychange', () => {
    if (document.visibilityState === 'hidden') void save();
  });
  window.addEventListener('hashchange', () => {
    const id = location.hash.slice(1);
    if (id && id !== current.value) open(id);
    else if (!id && kept.value.some((each) => each.id === current.value)) begin();
  });
  shelf = await Shelf.open();
  lasting.value = shelf.lasting;
  kept.value = await shelf.all();
  const id = location.hash.slice(1);
  if (kept.value.some((each) => each.id === id)) current.value = id;
  else begin();
  window.addEventListener('online', () => void connect());
  await connect();
}
