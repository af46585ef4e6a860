/** The list of conversations, and what belongs to the page as a whole: files, colours, the key, the shortcuts. */

import type { VNode } from 'preact';
import { useLayoutEffect, useRef, useState } from 'preact/hooks';
import { moment } from '../format';
import { Icon } from '../icons';
import { Mark } from '../knit';
import {
  begin, conversations, dialog, exportJson, exportMarkdown, forgetKey, found, importFile, keyed, lasting, open, remove, rename,
  running, serverVersion, setTheme, shown, sidebar, theme,
} from '../state';
import type { Theme } from '../state';
import type { Conversation } from '../tree';

function Entry({ one, here }: { one: Conversation; here: boolean }): VNode {
  const [naming, setNaming] = useState(false);
  const [sure, setSure] = useState(false);
  const field = useRef<HTMLInputElement>(null);
  useLayoutEffect(() => {
    field.current?.focus();
    field.current?.select();
  }, [naming]);
  const answering = running.value.has(one.id);
  return (
    <li class={here ? 'here' : ''}>
      {naming ? (
        <form
          onSubmit={(event) => {
            event.preventDefault();
            rename(one.id, field.current?.value ?? '');
            setNaming(false);
          }}
        >
          <input
            ref={field}
            aria-label="Name of this conversation"
            defaultValue={one.title}
            maxLength={300}
            onBlur={() => setNaming(false)}
            onKeyDown={(event) => {
              if (event.key !== 'Escape') return;
              event.stopPropagation();
              setNaming(false);
            }}
          />
        </form>
      ) : (
        <a
          href={'#' + one.id}
          aria-current={here ? 'page' : undefined}
          onClick={(event) => {
            if (event.ctrlKey || event.metaKey || event.shiftKey) return; // a tab of its own
            event.preventDefault();
            open(one.id);
          }}
        >
          <span class="title">{one.title}</span>
          <span class="when">{answering ? 'answering' : moment(one.changed)}</span>
        </a>
      )}
      {here && !naming && (
        <p class="row" role="group" aria-label={'This conversation: ' + one.title}>
          {sure ? (
            <>
              <span class="hint">Delete for ever?</span>
              <button type="button" class="quiet danger" onClick={() => remove(one.id)}>
                Delete
              </button>
              <button type="button" class="quiet" onClick={() => setSure(false)}>
                Keep
              </button>
            </>
          ) : (
            <>
              <button type="button" class="quiet" onClick={() => setNaming(true)}>
                <Icon name="edit" />
                Rename
              </button>
              <button type="button" class="quiet" onClick={() => exportMarkdown(one)}>
                <span class="unseen">Export as Markdown: </span>
                .md
              </button>
              <button type="button" class="quiet" onClick={() => exportJson([one])}>
                <span class="unseen">Export as JSON: </span>
                .json
              </button>
              <button type="button" class="quiet" onClick={() => setSure(true)} aria-label="Delete this conversation">
                <Icon name="bin" />
              </button>
            </>
          )}
        </p>
      )}
    </li>
  );
}

const THEMES: [Theme, 'system' | 'sun' | 'moon', string][] = [
  ['system', 'system', 'As the system'],
  ['light', 'sun', 'Light'],
  ['dark', 'moon', 'Dark'],
];

export function Sidebar(): VNode {
  const [wanted, setWanted] = useState('');
  const chooser = useRef<HTMLInputElement>(null);
  const list = found(wanted);
  return (
    <nav class={'sidebar' + (sidebar.value ? ' open' : '')} aria-label="Conversations" id="conversations">
      <div class="brand">
        <Mark />
        <span>Puna</span>
        <button type="button" class="quiet only-narrow" onClick={() => (sidebar.value = false)} aria-label="Close the list">
          <Icon name="close" />
        </button>
      </div>
      <button type="button" class="new" onClick={begin}>
        <Icon name="plus" />
        New conversation
      </button>
      <label class="search">
        <Icon name="search" />
        <span class="unseen">Search in conversations</span>
        <input
          id="search"
          type="search"
          placeholder="Search"
          value={wanted}
          onInput={(event) => setWanted(event.currentTarget.value)}
          onKeyDown={(event) => {
            if (event.key === 'Enter' && list[0]) open(list[0].id);
          }}
        />
      </label>
      <ul class="list">
        {list.map((one) => (
          <Entry key={one.id} one={one} here={one.id === shown.value.id} />
        ))}
        {list.length === 0 && (
          <li class="none">{wanted ? 'Nothing is found.' : 'Conversations appear here. They stay in this browser.'}</li>
        )}
      </ul>
      {!lasting.value && <p class="warn">This browser keeps nothing for this page: export what you want to have later.</p>}
      <div class="under">
        <div class="row">
          <input
            ref={chooser}
            class="unseen"
            type="file"
            tabIndex={-1}
            aria-hidden="true"
            accept="application/json,.json"
            onChange={(event) => {
              const input = event.currentTarget;
              const file = input.files?.[0];
              if (file) void importFile(file).then(() => (input.value = ''));
            }}
          />
          <button type="button" class="quiet" onClick={() => chooser.current?.click()}>
            <Icon name="in" />
            Import
          </button>
          <button type="button" class="quiet" disabled={conversations.value.length === 0} onClick={() => exportJson(conversations.value)}>
            <Icon name="out" />
            Export all
          </button>
        </div>
        <div class="row">
          <fieldset class="theme">
            <legend class="unseen">Colours</legend>
            {THEMES.map(([name, icon, label]) => (
              <label key={name} title={label}>
                <input type="radio" name="theme" checked={theme.value === name} onChange={() => setTheme(name)} />
                <Icon name={icon} />
                <span class="unseen">{label}</span>
              </label>
            ))}
          </fieldset>
          <button type="button" class="quiet" onClick={() => (dialog.value = 'keys')} aria-label="Keyboard shortcuts">
            <kbd>?</kbd>
          </button>
          {keyed.value && (
            <button type="button" class="quiet" onClick={forgetKey}>
              <Icon name="key" />
              Forget key
            </button>
          )}
          {serverVersion.value && <span class="hint">{serverVersion.value}</span>}
        </div>
      </div>
    </nav>
  );
}
