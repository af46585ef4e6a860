/**
 * The server, as the page speaks to it: OpenAI's protocol for models and answers, `/puna/engine` for the live view.
 *
 * Not here: what is done with an answer. Surprising: only what a person changed is sent, so that the server's own
 * defaults hold; and whatever the server says is checked before it is believed, since a proxy may have said it.
 */

import { Events } from './sse';
import type { Sampling, ToolCall } from './tree';

export interface Model {
  id: string;
  context_length: number;
  nbytes: number;
  loaded: boolean;
  fits: boolean;
  why: string;
  /** False: a base model, which goes on with a text and knows no turns. */
  chat: boolean;
  tools: boolean;
  sees: boolean;
  quantization: string;
  parameters: number;
}

export interface EngineModel {
  id: string;
  kernels: string;
  kv_type: string;
  running: number;
  waiting: number;
  pages_total: number;
  pages_used: number;
  pages_cached: number;
  pages_free: number;
  page_tokens: number;
  computed_tokens: number;
  reused_tokens: number;
  made_tokens: number;
  guessed_tokens: number;
  right_guesses: number;
  preemptions: number;
  context_length: number;
}

export interface EngineStream {
  id: string;
  model: string;
  key: string;
  seconds: number;
  prompt_tokens: number;
  made_tokens: number;
  state: string;
}

export interface Engine {
  models: EngineModel[];
  streams: EngineStream[];
  memory: { resident: number; available: number };
  uptime: number;
}

/** The server refused, or could not be reached. `status` is 0 where no answer came. */
export class Refused extends Error {
  constructor(
    readonly status: number,
    message: string,
  ) {
    super(message);
  }
}

type Json = Record<string, unknown>;

const isObject = (value: unknown): value is Json => typeof value === 'object' && value !== null && !Array.isArray(value);
const text = (value: unknown): string => (typeof value === 'string' ? value : '');
const number = (value: unknown): number => (typeof value === 'number' && Number.isFinite(value) && value >= 0 ? value : 0);
const objects = (value: unknown): Json[] => (Array.isArray(value) ? value.filter(isObject) : []);

/** What an error answer says: the server's message, and its remedy where that stands apart. */
export function complaint(body: unknown, otherwise: string): string {
  const error = isObject(body) ? (body['error'] ?? body['detail']) : undefined;
  if (typeof error === 'string' && error) return error;
  if (!isObject(error)) return otherwise;
  const message = text(error['message']) || otherwise;
  const remedy = text(error['remedy']);
  return remedy && !message.includes(remedy) ? message + '\n' + remedy : message;
}

async function ask(path: string, key: string, body?: object, signal?: AbortSignal): Promise<Response> {
  const headers: Record<string, string> = { Accept: body ? 'text/event-stream' : 'application/json' };
  if (key) headers['Authorization'] = 'Bearer ' + key;
  const request: RequestInit = { headers, credentials: 'same-origin', redirect: 'error', cache: 'no-store' };
  if (body) {
    request.method = 'POST';
    request.body = JSON.stringify(body);
    headers['Content-Type'] = 'application/json';
  }
  if (signal) request.signal = signal;
  let answer: Response;
  try {
    answer = await fetch(path, request);
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Refused(0, 'The server cannot be reached. Is `puna serve` still running?');
  }
  if (answer.ok) return answer;
  let said: unknown = null;
  try {
    said = await answer.json();
  } catch {
    // Not JSON, as a proxy's error page is not: the status has to do.
  }
  throw new Refused(answer.status, complaint(said, `The server answered ${answer.status} ${answer.statusText}`.trim() + '.'));
}

async function json(path: string, key: string): Promise<Json> {
  const answer = await ask(path, key);
  let said: unknown;
  try {
    said = await answer.json();
  } catch {
    throw new Refused(answer.status, `What came from ${path} is not JSON. Is this address Puna's?`);
  }
  if (!isObject(said)) throw new Refused(answer.status, `What came from ${path} is not an object. Is this address Puna's?`);
  return said;
}

export async function version(key: string): Promise<string> {
  return text((await json('/version', key))['version']);
}

export async function models(key: string): Promise<Model[]> {
  return objects((await json('/v1/models', key))['data'])
    .filter((each) => text(each['id']) !== '')
    .map((each) => {
      const more = isObject(each['puna']) ? each['puna'] : {};
      return {
        id: text(each['id']),
        context_length: number(more['context_length']),
        nbytes: number(more['nbytes']),
        loaded: more['loaded'] === true,
        fits: more['fits'] !== false,
        why: text(more['why']),
        chat: more['chat'] !== false,
        tools: more['tools'] === true,
        sees: more['sees'] === true,
        quantization: text(more['quantization']),
        parameters: number(more['parameters']),
      };
    });
}

export async function engine(key: string): Promise<Engine> {
  const said = await json('/puna/engine', key);
  const memory = isObject(said['memory']) ? said['memory'] : {};
  return {
    models: objects(said['models']).map((each) => ({
      id: text(each['id']),
      kernels: text(each['kernels']),
      kv_type: text(each['kv_type']),
      running: number(each['running']),
      waiting: number(each['waiting']),
      pages_total: number(each['pages_total']),
      pages_used: number(each['pages_used']),
      pages_cached: number(each['pages_cached']),
      pages_free: number(each['pages_free']),
      page_tokens: number(each['page_tokens']),
      computed_tokens: number(each['computed_tokens']),
      reused_tokens: number(each['reused_tokens']),
      made_tokens: number(each['made_tokens']),
      guessed_tokens: number(each['guessed_tokens']),
      right_guesses: number(each['right_guesses']),
      preemptions: number(each['preemptions']),
      context_length: number(each['context_length']),
    })),
    streams: objects(said['streams']).map((each) => ({
      id: text(each['id']),
      model: text(each['model']),
      key: text(each['key']),
      seconds: number(each['seconds']),
      prompt_tokens: number(each['prompt_tokens']),
      made_tokens: number(each['made_tokens']),
      state: text(each['state']),
    })),
    memory: { resident: number(memory['resident']), available: number(memory['available']) },
    uptime: number(said['uptime']),
  };
}

/** The engine as it was at a moment, in milliseconds of the page's clock. */
export interface Look {
  at: number;
  engine: Engine;
}

/** What grew between two looks, a second. 0 where the engine was started anew in between. */
export function rate(before: Look, after: Look, id: string, of: (one: EngineModel) => number): number {
  const one = before.engine.models.find((each) => each.id === id);
  const other = after.engine.models.find((each) => each.id === id);
  const seconds = (after.at - before.at) / 1000;
  return one && other && seconds > 0 ? Math.max(0, of(other) - of(one)) / seconds : 0;
}

export type Part = { type: 'text'; text: string } | { type: 'image_url'; image_url: { url: string } };
export interface Message {
  role: 'system' | 'user' | 'assistant';
  content: string | Part[] | null;
  /** In the place of content: why there was no answer. */
  refusal?: string;
}

/** The settings that were changed from the model's own, by their names in the protocol. */
export function changed(sampling: Sampling): Json {
  const sent: Json = {};
  for (const [name, value] of Object.entries(sampling))
    if (Array.isArray(value) ? value.length > 0 : value !== null) sent[name] = value;
  return sent;
}

export interface Usage {
  prompt: number;
  made: number;
  cached: number;
}

/** What came of an answer so far. */
export interface Heard {
  text: string;
  /** Why there is no answer, where one was declined or kept back. */
  refusal: string;
  tools: ToolCall[];
  /** Why it ended, in the protocol's words; '' while it has not. */
  finish: string;
  usage: Usage | null;
  /** An error in mid-stream, in the server's words. */
  error: string;
  /** The server said that there is no more. */
  done: boolean;
}

/** `heard` with one event's data. Throws nothing: what is no chunk is an error of the stream. */
export function hear(heard: Heard, data: string): Heard {
  if (data === '[DONE]') return { ...heard, done: true };
  let chunk: unknown;
  try {
    chunk = JSON.parse(data);
  } catch {
    return { ...heard, error: 'The server sent something that is not JSON in the middle of its answer.' };
  }
  if (!isObject(chunk)) return { ...heard, error: 'The server sent something that is not a chunk in its answer.' };
  if (chunk['error'] !== undefined && chunk['error'] !== null)
    return { ...heard, error: complaint(chunk, 'The answer broke off with an error.') };
  const next = { ...heard };
  const usage = chunk['usage'];
  if (isObject(usage)) {
    const details = isObject(usage['prompt_tokens_details']) ? usage['prompt_tokens_details'] : {};
    next.usage = {
      prompt: number(usage['prompt_tokens']),
      made: number(usage['completion_tokens']),
      cached: number(details['cached_tokens']),
    };
  }
  const choice = objects(chunk['choices'])[0];
  if (!choice) return next;
  if (text(choice['finish_reason'])) next.finish = text(choice['finish_reason']);
  const delta = isObject(choice['delta']) ? choice['delta'] : {};
  next.text += text(choice['text']) + text(delta['content']);
  next.refusal += text(delta['refusal']);
  for (const call of objects(delta['tool_calls'])) {
    const at = number(call['index']);
    const told = isObject(call['function']) ? call['function'] : {};
    if (at > next.tools.length || at >= 128) continue; // calls are numbered from 0 without holes
    const tools = next.tools.slice();
    const before = tools[at] ?? { name: '', arguments: '' };
    tools[at] = { name: before.name + text(told['name']), arguments: before.arguments + text(told['arguments']) };
    next.tools = tools;
  }
  return next;
}

export interface Question {
  model: string;
  sampling: Sampling;
  /** For a model that chats. */
  messages?: Message[];
  /** For one that goes on with a text. */
  prompt?: string;
}

/** The answer to a question as it grows. Throws `Refused`, or an AbortError where `signal` fired. */
export async function* answer(question: Question, key: string, signal: AbortSignal): AsyncGenerator<Heard> {
  const path = question.messages ? '/v1/chat/completions' : '/v1/completions';
  const body = {
    model: question.model,
    ...(question.messages ? { messages: question.messages } : { prompt: question.prompt ?? '' }),
    stream: true,
    stream_options: { include_usage: true },
    ...changed(question.sampling),
  };
  const response = await ask(path, key, body, signal);
  let heard: Heard = { text: '', refusal: '', tools: [], finish: '', usage: null, error: '', done: false };
  if (!response.body) throw new Refused(response.status, 'The server sent an empty answer.');
  const reader = response.body.getReader();
  const events = new Events();
  try {
    while (!heard.done && !heard.error) {
      let piece: ReadableStreamReadResult<Uint8Array>;
      try {
        piece = await reader.read();
      } catch (error) {
        if (signal.aborted) throw error;
        yield { ...heard, error: 'The connection broke, so this answer is incomplete. Ask again for a whole one.' };
        return;
      }
      if (piece.done) {
        yield { ...heard, error: 'The answer stopped without an end, so it is incomplete. Ask again for a whole one.' };
        return;
      }
      const told = events.push(piece.value);
      if (told.length === 0) continue;
      for (const data of told) {
        heard = hear(heard, data);
        if (heard.done || heard.error) break;
      }
      yield heard;
    }
  } finally {
    reader.cancel().catch(() => undefined); // a stream that broke cannot be cancelled, and need not be
  }
}
