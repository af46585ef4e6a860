/** What the model is told and how its words are drawn. Empty means: as the model has it; only what is filled in is sent. */

import type { VNode } from 'preact';
import { useState } from 'preact/hooks';
import { RANGES, typedNumber } from '../exchange';
import type { Numeric } from '../exchange';
import { Icon } from '../icons';
import { keepAsDefaults, model, panel, setSampling, setSystem, shown } from '../state';
import { AS_THE_MODEL_HAS_IT } from '../tree';
import type { Sampling } from '../tree';

const FIELDS: [Numeric, string, string][] = [
  ['temperature', 'Temperature', '0 always takes the likeliest word; higher wanders more.'],
  ['top_p', 'Top p', 'Draws from the likeliest words that make up this share.'],
  ['top_k', 'Top k', 'Draws from this many likeliest words; 0 from all.'],
  ['min_p', 'Min p', 'Leaves out words below this share of the likeliest.'],
  ['repetition_penalty', 'Repetition penalty', 'Above 1 holds back words that were used before.'],
  ['max_tokens', 'Max tokens', 'An answer ends here at the latest.'],
  ['seed', 'Seed', 'The same seed and question draw the same words.'],
];

function Dial({ name, label, help }: { name: Numeric; label: string; help: string }): VNode {
  const value = shown.value.sampling[name];
  const [typed, setTyped] = useState<string | null>(null);
  const trouble = typed === null ? null : typedNumber(name, typed);
  const wrong = typeof trouble === 'string';
  return (
    <div class={'dial' + (value !== null ? ' set' : '')}>
      <label for={'dial-' + name}>{label}</label>
      <input
        id={'dial-' + name}
        inputMode={RANGES[name].step === 1 ? 'numeric' : 'decimal'}
        autocomplete="off"
        placeholder="default"
        aria-describedby={'help-' + name}
        aria-invalid={wrong}
        value={typed ?? (value === null ? '' : String(value))}
        onInput={(event) => {
          const now = event.currentTarget.value;
          const read = typedNumber(name, now);
          setTyped(now);
          setSampling({ ...shown.value.sampling, [name]: typeof read === 'string' ? null : read });
        }}
        onBlur={() => {
          if (!wrong) setTyped(null);
        }}
      />
      <p id={'help-' + name} class={wrong ? 'wrong' : 'hint'}>
        {wrong ? trouble : help}
      </p>
    </div>
  );
}

function Stops({ sampling }: { sampling: Sampling }): VNode {
  const [typed, setTyped] = useState<string | null>(null);
  return (
    <div class={'dial tall' + (sampling.stop.length ? ' set' : '')}>
      <label for="dial-stop">Stop at</label>
      <textarea
        id="dial-stop"
        rows={2}
        spellcheck={false}
        placeholder="nothing"
        aria-describedby="help-stop"
        value={typed ?? sampling.stop.join('\n')}
        onInput={(event) => {
          const now = event.currentTarget.value;
          setTyped(now);
          setSampling({ ...shown.value.sampling, stop: now.split('\n').filter((line) => line !== '').slice(0, 64) });
        }}
        onBlur={() => setTyped(null)}
      />
      <p id="help-stop" class="hint">
        One text a line; an answer ends before any of them.
      </p>
    </div>
  );
}

export function Settings(): VNode {
  const { system, sampling, id } = shown.value;
  const base = model.value?.chat === false;
  const untouched = system === '' && Object.values(sampling).every((value) => value === null || (Array.isArray(value) && !value.length));
  return (
    <aside class="panel settings" aria-label="Settings of this conversation" id="settings">
      <header>
        <h2>Settings</h2>
        <button type="button" class="quiet" onClick={() => (panel.value = 'none')} aria-label="Close the settings">
          <Icon name="close" />
        </button>
      </header>
      <div class="inside" key={id}>
        <p class="hint">They belong to this conversation. What is left empty stays as the model has it.</p>
        <div class="dial tall">
          <label for="system">System prompt</label>
          <textarea
            id="system"
            rows={5}
            disabled={base}
            placeholder={base ? 'A base model has none' : 'Who the model is and how it answers'}
            value={system}
            onInput={(event) => setSystem(event.currentTarget.value)}
          />
        </div>
        {FIELDS.map(([name, label, help]) => (
          <Dial key={name} name={name} label={label} help={help} />
        ))}
        <Stops sampling={sampling} />
        <p class="row">
          <button
            type="button"
            disabled={untouched}
            onClick={() => {
              setSampling(AS_THE_MODEL_HAS_IT);
              setSystem('');
            }}
          >
            All to default
          </button>
          <button type="button" onClick={keepAsDefaults}>
            Keep for new conversations
          </button>
        </p>
      </div>
    </aside>
  );
}
