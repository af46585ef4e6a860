/** One turn of a conversation: who, what, what it cost, and what can be done with it. */

import type { VNode } from 'preact';
import { useLayoutEffect, useRef, useState } from 'preact/hooks';
import { count, duration, moment, speed } from '../format';
import { Icon } from '../icons';
import { Meter } from '../knit';
import { again, answerAfter, busy, editing, rewrite, running, send, show, shown, stop } from '../state';
import { versions } from '../tree';
import type { Cost, Picture, Turn } from '../tree';
import { Code, CopyButton, Prose } from './prose';

export function grow(field: HTMLTextAreaElement | null): void {
  if (!field) return;
  field.style.height = 'auto';
  field.style.height = field.scrollHeight + 2 + 'px';
}

export function Pictures({ pictures, remove }: { pictures: Picture[]; remove?: (at: number) => void }): VNode | null {
  if (pictures.length === 0) return null;
  return (
    <ul class="pictures">
      {pictures.map((one, at) => (
        <li key={at}>
          <img src={one.url} alt={one.name} />
          {remove && (
            <button type="button" class="quiet" onClick={() => remove(at)} aria-label={`Take ${one.name} away`}>
              <Icon name="close" />
            </button>
          )}
        </li>
      ))}
    </ul>
  );
}

/** Rewriting a turn in its place. */
export function Rewrite({ turn }: { turn: Turn }): VNode {
  const [text, setText] = useState(turn.text);
  const [pictures, setPictures] = useState(turn.pictures);
  const field = useRef<HTMLTextAreaElement>(null);
  useLayoutEffect(() => {
    grow(field.current);
    field.current?.focus();
    field.current?.setSelectionRange(turn.text.length, turn.text.length);
  }, []);
  const asks = turn.role === 'user';
  const ready = text.trim() !== '' || pictures.length > 0;
  const save = (): void => {
    if (ready) rewrite(turn, text, pictures);
  };
  return (
    <form
      class="rewrite"
      onSubmit={(event) => {
        event.preventDefault();
        save();
      }}
    >
      <Pictures pictures={pictures} remove={(gone) => setPictures(pictures.filter((_, at) => at !== gone))} />
      <textarea
        ref={field}
        aria-label={asks ? 'Your message, to be asked anew' : 'The answer, to be kept as another version'}
        value={text}
        onInput={(event) => {
          setText(event.currentTarget.value);
          grow(event.currentTarget);
        }}
        onKeyDown={(event) => {
          if (event.isComposing) return;
          if (event.key === 'Escape') {
            event.stopPropagation();
            editing.value = null;
          } else if (event.key === 'Enter' && (asks ? !event.shiftKey : event.ctrlKey || event.metaKey)) {
            event.preventDefault();
            save();
          }
        }}
      />
      <p class="row">
        <button type="submit" class="solid" disabled={!ready}>
          {asks ? 'Ask anew' : 'Keep as a version'}
        </button>
        <button type="button" class="quiet" onClick={() => (editing.value = null)}>
          Cancel
        </button>
        <span class="hint">What was there before stays as another version.</span>
      </p>
    </form>
  );
}

export function Versions({ turn }: { turn: Turn }): VNode | null {
  const all = versions(shown.value, turn.parent);
  if (all.length < 2) return null;
  const at = all.findIndex((each) => each.id === turn.id);
  const step = (by: number): void => {
    const next = all[at + by];
    if (next) show(next.id);
  };
  return (
    <span class="versions" role="group" aria-label="Versions">
      <button type="button" class="quiet" disabled={at === 0} onClick={() => step(-1)} aria-label="Version before">
        <Icon name="left" />
      </button>
      <span>
        {at + 1}
        <span aria-hidden="true">/</span>
        <span class="unseen"> of </span>
        {all.length}
      </span>
      <button type="button" class="quiet" disabled={at === all.length - 1} onClick={() => step(1)} aria-label="Version after">
        <Icon name="right" />
      </button>
    </span>
  );
}

export function CostLine({ cost }: { cost: Cost }): VNode {
  const used = cost.prompt + cost.made;
  return (
    <p class="cost">
      <span>
        <b>{count(cost.made)}</b> tokens
      </span>
      <span>
        <b>{count(speed(cost))}</b> tokens/s
      </span>
      <span title="Time until the first word">first after {duration(cost.first)}</span>
      {cost.cached > 0 && (
        <span title="Tokens of the prompt that were known from before and not computed again">
          {count(cost.cached)} of {count(cost.prompt)} reused
        </span>
      )}
      {cost.context > 0 ? (
        <span class="context">
          <Meter share={used / cost.context} stitches={16} label={`${Math.round((used / cost.context) * 100)} % of the context used`} />
          context {count(used)} of {count(cost.context)}
        </span>
      ) : (
        <span>context {count(used)}</span>
      )}
    </p>
  );
}

const ENDS: Record<string, string> = {
  length: 'Cut off: the limit of tokens was reached, or the context is full.',
  stopped: 'Stopped by you.',
};
const QUIET_ENDS = ['stop', 'tool_calls', 'function_call', 'edited', 'error', 'length', 'stopped', 'content_filter'];

/** Why an answer ended, where that is worth a word. */
export function Ending({ turn }: { turn: Turn }): VNode | null {
  if (running.value.get(shown.value.id) === turn.id) return null;
  if (turn.error)
    return (
      <div class="trouble" role="note">
        <p>{turn.text || turn.tools.length ? 'This answer is incomplete.' : 'No answer.'}</p>
        <p class="said">{turn.error}</p>
        <button type="button" onClick={() => void again(shown.value.id, turn.id)} disabled={busy.value}>
          Ask again
        </button>
      </div>
    );
  if (turn.refusal || turn.finish === 'content_filter')
    return (
      <div class="kept-back" role="note">
        <p>
          <Icon name="shield" />
          {turn.finish === 'content_filter' ? 'Kept back by this server’s guard' : 'Declined'}
        </p>
        {turn.refusal && <p class="said">{turn.refusal}</p>}
      </div>
    );
  const word =
    turn.finish === ''
      ? 'Incomplete: the page was closed while this was being written.'
      : (ENDS[turn.finish] ?? (QUIET_ENDS.includes(turn.finish) ? '' : `Ended: ${turn.finish}.`));
  return word ? <p class="ending">{word}</p> : null;
}

function tidy(json: string): string {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json; // as the model wrote it
  }
}

export function Tools({ turn }: { turn: Turn }): VNode | null {
  if (turn.tools.length === 0) return null;
  return (
    <>
      {turn.tools.map((call, at) => (
        <section key={at} class="call" aria-label={'Tool call: ' + call.name}>
          <p>
            Asks for the tool <code>{call.name}</code>
          </p>
          <Code text={tidy(call.arguments)} language="json" />
        </section>
      ))}
    </>
  );
}

/** What is shown until the first word comes. */
export function Waiting(): VNode {
  return (
    <p class="waiting">
      <span class="unseen">Waiting for the first word</span>
      <i />
      <i />
      <i />
      <i />
      <i />
    </p>
  );
}

export function TurnView({ turn, last }: { turn: Turn; last: boolean }): VNode {
  const writing = running.value.get(shown.value.id) === turn.id;
  const who = turn.role === 'user' ? 'You' : turn.model || 'Answer';
  const rewriting = editing.value === turn.id;
  return (
    <article class={'turn ' + turn.role} aria-busy={writing} data-turn={turn.id}>
      <header>
        <h2>{who}</h2>
        <time dateTime={new Date(turn.at).toISOString()}>{moment(turn.at)}</time>
      </header>
      <div class="said">
        {rewriting ? (
          <Rewrite key={turn.id} turn={turn} />
        ) : (
          <>
            <Pictures pictures={turn.pictures} />
            {turn.role === 'user' ? <p class="plain">{turn.text}</p> : turn.text && <Prose text={turn.text} />}
            <Tools turn={turn} />
            {writing && !turn.text && !turn.refusal && !turn.tools.length && <Waiting />}
            {turn.role === 'assistant' && <Ending turn={turn} />}
            <footer>
              <Versions turn={turn} />
              {!writing && (
                <>
                  {turn.text && <CopyButton text={turn.text} what={turn.role === 'user' ? 'this message' : 'this answer'} />}
                  {!busy.value && (
                    <button type="button" class="quiet" onClick={() => (editing.value = turn.id)}>
                      <Icon name="edit" />
                      <span>Edit</span>
                      <span class="unseen"> {turn.role === 'user' ? 'this message' : 'this answer'}</span>
                    </button>
                  )}
                  {turn.role === 'assistant' && !turn.error && !busy.value && (
                    <button type="button" class="quiet" onClick={() => void again(shown.value.id, turn.id)}>
                      <Icon name="again" />
                      <span>Again</span>
                    </button>
                  )}
                  {turn.role === 'user' && last && !busy.value && (
                    <button type="button" class="quiet" onClick={() => void answerAfter(shown.value.id, turn.id)}>
                      <Icon name="again" />
                      <span>Answer this</span>
                    </button>
                  )}
                </>
              )}
              {turn.cost && !writing && <CostLine cost={turn.cost} />}
            </footer>
          </>
        )}
      </div>
    </article>
  );
}

/** A base model's work: one text that two hands write. */
export function Manuscript({ turns }: { turns: readonly Turn[] }): VNode {
  const writing = running.value.get(shown.value.id);
  const end = turns.at(-1);
  const made = end?.role === 'assistant' ? end : undefined;
  const own = turns.filter((each) => each.role === 'user').at(-1);
  const whole = turns.map((each) => each.text).join('');
  return (
    <article class="turn manuscript" aria-busy={writing !== undefined}>
      <header>
        <h2>{made?.model || 'Text'}</h2>
        {made && <time dateTime={new Date(made.at).toISOString()}>{moment(made.at)}</time>}
      </header>
      <div class="said">
        <div class="sheet">
          {turns.map((each) =>
            editing.value === each.id ? (
              <Rewrite key={each.id} turn={each} />
            ) : (
              <span key={each.id} class={each.role}>
                {each.text}
              </span>
            ),
          )}
        </div>
        {writing && !made?.text && <Waiting />}
        {made && <Ending turn={made} />}
        <footer>
          {made && <Versions turn={made} />}
          {!writing && (
            <>
              {made && (
                <button type="button" class="quiet" onClick={() => send('', [])}>
                  <Icon name="right" />
                  <span>Go on</span>
                </button>
              )}
              {made && (
                <button type="button" class="quiet" onClick={() => void again(shown.value.id, made.id)}>
                  <Icon name="again" />
                  <span>Again</span>
                </button>
              )}
              {own && (
                <button type="button" class="quiet" onClick={() => (editing.value = own.id)}>
                  <Icon name="edit" />
                  <span>Edit your words</span>
                </button>
              )}
              {own && <Versions turn={own} />}
              <CopyButton text={whole} what="the whole text" />
            </>
          )}
          {writing && (
            <button type="button" class="quiet" onClick={() => stop()}>
              <Icon name="stop" />
              <span>Stop</span>
            </button>
          )}
          {made?.cost && !writing && <CostLine cost={made.cost} />}
        </footer>
      </div>
    </article>
  );
}
