/** The page as a whole: the list, the conversation, a panel beside it; and the keyboard. */

import type { VNode } from 'preact';
import { useEffect, useLayoutEffect, useRef, useState } from 'preact/hooks';
import { Icon } from './icons';
import { Plateau } from './knit';
import { Composer } from './parts/composer';
import { Dialogs, facts, MAC } from './parts/dialogs';
import { EngineView } from './parts/engine';
import { copy } from './parts/prose';
import { Settings } from './parts/settings';
import { Sidebar } from './parts/sidebar';
import { Manuscript, TurnView } from './parts/turn';
import {
  again, begin, busy, connect, dialog, editing, mayWatch, model, models, modelsTrouble, notice, panel, running, show, shown,
  shownPath, sidebar, spoken, stop, tell,
} from './state';
import { versions } from './tree';

function Empty(): VNode {
  const one = model.value;
  const base = one?.chat === false;
  return (
    <div class="empty">
      <Plateau />
      <h1>{base ? 'Begin a text.' : 'Ask something.'}</h1>
      <p>
        {one
          ? base
            ? `${one.id} is a base model: it goes on with what you write, word by word, and knows no questions and answers.`
            : `${one.id} runs on this server. What you say goes there and nowhere else; the conversation stays in this browser.`
          : modelsTrouble.value === null
            ? 'Asking the server which models it has …'
            : modelsTrouble.value}
      </p>
      {!one && modelsTrouble.value !== null && (
        <button type="button" onClick={() => void connect()}>
          Try again
        </button>
      )}
    </div>
  );
}

function Top(): VNode {
  const one = model.value;
  const wanted = shown.value.model;
  const gone = wanted !== '' && models.value.length > 0 && !models.value.some((each) => each.id === wanted);
  const toggle = (which: 'settings' | 'engine'): void => {
    panel.value = panel.value === which ? 'none' : which;
  };
  return (
    <div class="top">
      <button
        type="button"
        class="quiet only-narrow"
        aria-label="Conversations"
        aria-controls="conversations"
        aria-expanded={sidebar.value}
        onClick={() => (sidebar.value = true)}
      >
        <Icon name="menu" />
      </button>
      <button type="button" class="picker" aria-haspopup="dialog" onClick={() => (dialog.value = 'models')}>
        <span class="unseen">Model: </span>
        <span class="name">{one?.id ?? 'No model'}</span>
        <span class="facts">{gone ? `instead of ${wanted}, which is not served here` : one ? facts(one).join(' · ') : 'choose one'}</span>
      </button>
      <span class="row">
        {mayWatch.value && (
          <button type="button" class="quiet" aria-pressed={panel.value === 'engine'} onClick={() => toggle('engine')}>
            <Icon name="engine" />
            <span>Engine</span>
          </button>
        )}
        <button type="button" class="quiet" aria-pressed={panel.value === 'settings'} onClick={() => toggle('settings')}>
          <Icon name="dials" />
          <span>Settings</span>
        </button>
      </span>
    </div>
  );
}

function Conversation(): VNode {
  const scroll = useRef<HTMLDivElement>(null);
  const [away, setAway] = useState(false);
  const turns = shownPath.value;
  const id = shown.value.id;
  const toEnd = (): void => {
    const box = scroll.current;
    if (box) box.scrollTop = box.scrollHeight;
  };
  useLayoutEffect(() => {
    setAway(false);
    toEnd();
  }, [id]);
  useLayoutEffect(() => {
    if (!away && editing.value === null) toEnd(); // one who scrolled up reads there and is not pulled away
  });
  return (
    <div
      class="scroll"
      ref={scroll}
      tabIndex={-1}
      onScroll={(event) => {
        const box = event.currentTarget;
        setAway(box.scrollHeight - box.scrollTop - box.clientHeight > 80);
      }}
    >
      {turns.length === 0 ? (
        <Empty />
      ) : (
        <div class="turns">
          <h1 class="unseen">{shown.value.title}</h1>
          {model.value?.chat === false ? (
            <Manuscript turns={turns} />
          ) : (
            turns.map((one, at) => <TurnView key={one.id} turn={one} last={at === turns.length - 1} />)
          )}
        </div>
      )}
      <div class="foot">
        {away && turns.length > 0 && (
          <button type="button" class="to-end" onClick={toEnd}>
            <Icon name="down" />
            <span>To the end</span>
          </button>
        )}
        <Composer />
      </div>
    </div>
  );
}

/** The keyboard, where no field has the focus or the shortcut cannot be meant for one. Returns whether it was one. */
function press(event: KeyboardEvent): boolean {
  const target = event.target;
  const typing = target instanceof HTMLInputElement || target instanceof HTMLTextAreaElement;
  if (dialog.value !== 'none') return false;
  const last = shownPath.value.findLast((each) => each.role === 'assistant');
  const step = (by: number): boolean => {
    if (!last) return false;
    const all = versions(shown.value, last.parent);
    const next = all[all.findIndex((each) => each.id === last.id) + by];
    if (next) show(next.id);
    return true;
  };
  if ((event.ctrlKey || event.metaKey) && !event.altKey && !event.shiftKey && event.code === 'KeyK') {
    sidebar.value = true;
    const find = (): void => document.getElementById('search')?.focus();
    find();
    setTimeout(find); // on a telephone the list is not there yet
    return true;
  }
  if (event.altKey && event.ctrlKey === MAC && !event.metaKey && !event.shiftKey) {
    if (event.code.startsWith('Arrow') && target instanceof HTMLTextAreaElement && target.value) return false; // moves the caret
    switch (event.code) {
      case 'KeyN':
        begin();
        return true;
      case 'KeyM':
        dialog.value = 'models';
        return true;
      case 'KeyS':
        panel.value = panel.value === 'settings' ? 'none' : 'settings';
        return true;
      case 'KeyE':
        if (!mayWatch.value) return false;
        panel.value = panel.value === 'engine' ? 'none' : 'engine';
        return true;
      case 'KeyR':
        if (last) void again(shown.value.id, last.id);
        return true;
      case 'KeyC':
        if (last) void copy(last.text).then((done) => done && tell('The answer is copied.'));
        return true;
      case 'ArrowUp': {
        const own = shownPath.value.findLast((each) => each.role === 'user');
        if (own && !busy.value) editing.value = own.id;
        return true;
      }
      case 'ArrowLeft':
        return step(-1);
      case 'ArrowRight':
        return step(1);
    }
    return false;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return false;
  if (event.key === 'Escape') {
    if (running.value.has(shown.value.id)) stop();
    else if (editing.value !== null) editing.value = null;
    else if (sidebar.value) sidebar.value = false;
    else if (panel.value !== 'none') panel.value = 'none';
    else return false;
    return true;
  }
  if (typing) return false;
  if (event.key === '?') {
    dialog.value = 'keys';
    return true;
  }
  if (event.key === '/') {
    document.getElementById('say')?.focus();
    return true;
  }
  return false;
}

export function App(): VNode {
  useEffect(() => {
    const listen = (event: KeyboardEvent): void => {
      if (!event.defaultPrevented && press(event)) event.preventDefault();
    };
    window.addEventListener('keydown', listen);
    return () => window.removeEventListener('keydown', listen);
  }, []);
  return (
    <div class={'page with-' + panel.value}>
      <a class="skip" href="#say" onClick={(event) => {
        event.preventDefault();
        document.getElementById('say')?.focus();
      }}>
        To the message
      </a>
      <Sidebar />
      {sidebar.value && <div class="veil" onClick={() => (sidebar.value = false)} />}
      <main class={shownPath.value.length === 0 ? 'fresh' : ''}>
        <Top />
        <Conversation />
      </main>
      {panel.value === 'settings' && <Settings />}
      {panel.value === 'engine' && <EngineView />}
      <Dialogs />
      <p class="unseen" role="status" aria-live="polite">
        {spoken.value}
      </p>
      {notice.value && <p class="notice">{notice.value}</p>}
    </div>
  );
}
