/** The dialogs: which model, which keys on the keyboard, which key to the door. The browser's own, so that focus stays inside. */

import type { ComponentChildren, VNode } from 'preact';
import { useEffect, useRef, useState } from 'preact/hooks';
import type { Model } from '../api';
import { bytes, count, parameters } from '../format';
import { Icon } from '../icons';
import { connect, dialog, keyTrouble, model, models, modelsTrouble, setModel, useKey } from '../state';

function Frame({ name, title, children }: { name: string; title: string; children: ComponentChildren }): VNode {
  const frame = useRef<HTMLDialogElement>(null);
  useEffect(() => {
    frame.current?.showModal();
  }, []);
  const shut = (): void => {
    dialog.value = 'none';
  };
  return (
    <dialog
      ref={frame}
      class={name}
      aria-labelledby={'title-' + name}
      onClose={shut}
      onClick={(event) => {
        if (event.target === frame.current) frame.current?.close(); // outside of what it shows
      }}
    >
      <div class="inside">
        <header>
          <h2 id={'title-' + name}>{title}</h2>
          <button type="button" class="quiet" onClick={() => frame.current?.close()} aria-label="Close">
            <Icon name="close" />
          </button>
        </header>
        {children}
      </div>
    </dialog>
  );
}

/** What is worth knowing about a model before choosing it. */
export function facts(one: Model): string[] {
  return [
    one.parameters > 0 ? parameters(one.parameters) + ' parameters' : '',
    one.quantization,
    one.nbytes > 0 ? bytes(one.nbytes) : '',
    one.context_length > 0 ? 'context ' + count(one.context_length) : '',
  ]
    .filter(Boolean)
    .map((fact) => fact.replaceAll(' ', '\u00a0')); // a line breaks between facts, not within one
}

function Choice({ one, chosen }: { one: Model; chosen: boolean }): VNode {
  return (
    <li>
      <button
        type="button"
        class={'choice' + (chosen ? ' chosen' : '')}
        aria-current={chosen ? 'true' : undefined}
        disabled={!one.fits}
        onClick={(event) => {
          setModel(one.id);
          event.currentTarget.closest('dialog')?.close();
        }}
      >
        <span class="name">{one.id}</span>
        <span class={'state ' + (one.loaded ? 'loaded' : one.fits ? 'fits' : 'not')}>
          {one.loaded ? 'loaded' : one.fits ? 'fits' : 'does not fit'}
        </span>
        <span class="facts">{facts(one).join(' · ')}</span>
        <span class="tags">
          <span>{one.chat ? 'chats' : 'goes on with a text'}</span>
          {one.sees && <span>sees pictures</span>}
          {one.tools && <span>calls tools</span>}
        </span>
        {!one.fits && one.why && <span class="why">{one.why}</span>}
      </button>
    </li>
  );
}

function Models(): VNode {
  const list = useRef<HTMLUListElement>(null);
  useEffect(() => {
    list.current?.querySelector<HTMLButtonElement>('[aria-current]')?.focus();
    void connect(); // what fits changes with what is loaded
  }, []);
  const arrows = (event: KeyboardEvent): void => {
    const step = event.key === 'ArrowDown' ? 1 : event.key === 'ArrowUp' ? -1 : 0;
    if (!step || !list.current) return;
    event.preventDefault();
    const all = [...list.current.querySelectorAll<HTMLButtonElement>('button:enabled')];
    const at = all.findIndex((each) => each === document.activeElement);
    all[(at + step + all.length) % all.length]?.focus();
  };
  return (
    <Frame name="models" title="Models">
      {modelsTrouble.value && (
        <p class="warn">
          {modelsTrouble.value} <button type="button" onClick={() => void connect()}>Try again</button>
        </p>
      )}
      <ul ref={list} onKeyDown={arrows}>
        {models.value.map((one) => (
          <Choice key={one.id} one={one} chosen={one.id === model.value?.id} />
        ))}
      </ul>
    </Frame>
  );
}

/** There Option alone writes letters. */
export const MAC = /^(Mac|iP)/.test(navigator.platform);
const ALT = MAC ? ['Ctrl', '⌥'] : ['Alt'];

const SHORTCUTS: [string[], string][] = [
  [['Enter'], 'Send'],
  [['Shift', 'Enter'], 'Break the line'],
  [['Esc'], 'Stop the answer; close what is open'],
  [[...ALT, 'N'], 'New conversation'],
  [[MAC ? '⌘' : 'Ctrl', 'K'], 'Search in conversations'],
  [['/'], 'To the message'],
  [[...ALT, 'M'], 'Choose a model'],
  [[...ALT, 'S'], 'Settings'],
  [[...ALT, 'E'], 'Engine'],
  [[...ALT, 'R'], 'Answer again'],
  [[...ALT, '↑'], 'Edit the last message'],
  [[...ALT, '←'], 'Version before of the last answer'],
  [[...ALT, '→'], 'Version after of the last answer'],
  [[...ALT, 'C'], 'Copy the last answer'],
  [['?'], 'This list'],
];

function Keys(): VNode {
  return (
    <Frame name="keys" title="Keyboard">
      <dl>
        {SHORTCUTS.map(([keys, what]) => (
          <div key={what}>
            <dt>
              {keys.map((each) => (
                <kbd key={each}>{each}</kbd>
              ))}
            </dt>
            <dd>{what}</dd>
          </div>
        ))}
      </dl>
    </Frame>
  );
}

function Key(): VNode {
  const [typed, setTyped] = useState('');
  const [lastingly, setLastingly] = useState(false);
  return (
    <Frame name="key" title="A key, please">
      <form
        onSubmit={(event) => {
          event.preventDefault();
          if (typed.trim()) useKey(typed, lastingly);
        }}
      >
        <p>
          This server answers only with an API key. <code>puna serve</code> prints one when it starts; <code>puna keys add</code> makes more.
        </p>
        {keyTrouble.value && (
          <p class="warn" role="alert">
            {keyTrouble.value}
          </p>
        )}
        <label for="key">API key</label>
        <input
          id="key"
          type="password"
          autocomplete="current-password"
          spellcheck={false}
          value={typed}
          onInput={(event) => setTyped(event.currentTarget.value)}
        />
        <label class="tick">
          <input type="checkbox" checked={lastingly} onChange={(event) => setLastingly(event.currentTarget.checked)} />
          <span>
            Remember it in this browser <span class="hint">otherwise it is gone with this tab</span>
          </span>
        </label>
        <p class="row">
          <button type="submit" class="solid" disabled={!typed.trim()}>
            Use this key
          </button>
        </p>
      </form>
    </Frame>
  );
}

export function Dialogs(): VNode | null {
  switch (dialog.value) {
    case 'models':
      return <Models />;
    case 'keys':
      return <Keys />;
    case 'key':
      return <Key />;
    case 'none':
      return null;
  }
}
