/** Where one writes. What was begun in a conversation is there again when one comes back to it, until the page closes. */

import type { VNode } from 'preact';
import { useEffect, useLayoutEffect, useRef, useState } from 'preact/hooks';
import { isPicture, LIMITS } from '../exchange';
import { Icon } from '../icons';
import { busy, model, send, shown, spoken, stop, tell } from '../state';
import type { Picture } from '../tree';
import { grow, Pictures } from './turn';

interface Draft {
  text: string;
  pictures: Picture[];
}

const drafts = new Map<string, Draft>();
const EMPTY: Draft = { text: '', pictures: [] };

function readFile(file: File): Promise<string> {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(String(reader.result));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

/** The pictures among these files; what cannot be shown to a model is told, not dropped. */
async function pictures(files: readonly File[], already: number): Promise<Picture[]> {
  const read: Picture[] = [];
  for (const file of files) {
    if (file.size > LIMITS.picture * 0.7) tell(`${file.name} is too large: pictures of up to ${Math.floor((LIMITS.picture * 0.7) / 1e6)} MB can be sent.`);
    else if (already + read.length >= LIMITS.pictures) tell(`At most ${LIMITS.pictures} pictures go with one message.`);
    else {
      const url = await readFile(file);
      if (isPicture(url)) read.push({ name: file.name.slice(0, 300) || 'picture', url });
      else tell(`${file.name} is no PNG, JPEG, WebP or GIF, which are the pictures that can be sent.`);
    }
  }
  return read;
}

export function Composer(): VNode {
  const id = shown.value.id;
  const [, redraw] = useState(0);
  const draft = drafts.get(id) ?? EMPTY;
  const field = useRef<HTMLTextAreaElement>(null);
  const chooser = useRef<HTMLInputElement>(null);
  const [over, setOver] = useState(false);
  const sees = model.value?.sees === true;
  const base = model.value?.chat === false;
  const begun = shown.value.turns.length > 0;
  const keep = (next: Partial<Draft>): void => {
    drafts.set(id, { ...(drafts.get(id) ?? EMPTY), ...next });
    redraw((n) => n + 1);
  };
  useLayoutEffect(() => grow(field.current), [draft.text, id]);
  useEffect(() => {
    if (window.matchMedia('(pointer: fine)').matches && !document.querySelector('dialog[open]')) field.current?.focus();
  }, [id]);

  const attach = async (files: readonly File[]): Promise<void> => {
    if (files.length === 0) return;
    if (!sees) {
      tell('This model does not see pictures. Choose one that does.');
      return;
    }
    const already = drafts.get(id)?.pictures ?? [];
    const more = await pictures(files, already.length);
    keep({ pictures: [...already, ...more] });
    if (more.length > 0) spoken.value = `Attached: ${more.map((one) => one.name).join(', ')}.`;
  };
  const go = (): void => {
    if (send(draft.text, draft.pictures)) {
      drafts.delete(id);
      redraw((n) => n + 1);
    }
  };
  const ready = draft.text.trim() !== '' || draft.pictures.length > 0 || (base && begun);
  return (
    <form
      class={'composer' + (over ? ' over' : '')}
      aria-label={base ? 'Write' : 'Message'}
      onSubmit={(event) => {
        event.preventDefault();
        go();
      }}
      onDragOver={(event) => {
        if (!event.dataTransfer?.types.includes('Files')) return;
        event.preventDefault();
        setOver(true);
      }}
      onDragLeave={() => setOver(false)}
      onDrop={(event) => {
        setOver(false);
        if (!event.dataTransfer?.files.length) return;
        event.preventDefault();
        void attach([...event.dataTransfer.files]);
      }}
    >
      <Pictures pictures={draft.pictures} remove={(gone) => keep({ pictures: draft.pictures.filter((_, at) => at !== gone) })} />
      <label class="unseen" for="say">
        {base ? 'Text for the model to go on with' : 'Message'}
      </label>
      <div class="box">
      <textarea
        id="say"
        ref={field}
        rows={1}
        placeholder={base ? (begun ? 'Write on, or let the model go on …' : 'Write a beginning; the model goes on …') : 'Write a message …'}
        value={draft.text}
        onInput={(event) => keep({ text: event.currentTarget.value })}
        onKeyDown={(event) => {
          if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
          if (window.matchMedia('(pointer: coarse)').matches) return; // there Enter is the only way to a new line
          event.preventDefault();
          if (!busy.value) go();
        }}
        onPaste={(event) => {
          const files = [...(event.clipboardData?.files ?? [])].filter((file) => file.type.startsWith('image/'));
          if (files.length === 0) return;
          event.preventDefault();
          void attach(files);
        }}
      />
      <div class="row">
        {sees && (
          <>
            <input
              ref={chooser}
              class="unseen"
              type="file"
              tabIndex={-1}
              aria-hidden="true"
              accept="image/png,image/jpeg,image/webp,image/gif"
              multiple
              onChange={(event) => {
                const input = event.currentTarget;
                void attach([...(input.files ?? [])]).then(() => (input.value = ''));
              }}
            />
            <button type="button" class="quiet attach" onClick={() => chooser.current?.click()}>
              <Icon name="clip" />
              <span>Attach a picture</span>
            </button>
          </>
        )}
        <span class="hint">
          <kbd>Enter</kbd> {base ? 'has it go on' : 'sends'}, <kbd>Shift</kbd> <kbd>Enter</kbd> breaks the line
        </span>
        {busy.value ? (
          <button type="button" class="solid stop" onClick={() => stop()}>
            <Icon name="stop" />
            <span>Stop</span>
          </button>
        ) : (
          <button type="submit" class="solid" disabled={!ready}>
            <Icon name="send" />
            <span>{base ? 'Go on' : 'Send'}</span>
          </button>
        )}
      </div>
      </div>
    </form>
  );
}
