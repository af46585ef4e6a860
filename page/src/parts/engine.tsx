/**
 * The engine at work, for the owner of the server: looked at once a second while this is open and the tab is seen.
 *
 * Surprising: the server counts since its start and keeps no history, so rates are differences between two looks.
 */

import type { VNode } from 'preact';
import { useEffect, useState } from 'preact/hooks';
import { rate, Refused } from '../api';
import type { EngineModel, Look } from '../api';
import { bytes, count, duration } from '../format';
import { Icon } from '../icons';
import { Meter, Pages } from '../knit';
import { lookAtEngine, mayWatch, panel } from '../state';

const KEPT = 61;
const ROWS = 40;

const share = (part: number, whole: number): string => (whole > 0 ? Math.round((part / whole) * 100) + ' %' : '–');

function Curve({ values }: { values: number[] }): VNode {
  const most = Math.max(1, ...values);
  const step = 240 / (KEPT - 2);
  const from = KEPT - 1 - values.length;
  const points = values.map((value, at) => `${((from + at) * step).toFixed(1)},${(39 - (value / most) * 36).toFixed(1)}`);
  return (
    <svg class="curve" viewBox="0 0 240 41" preserveAspectRatio="none" role="img" aria-label={`Tokens a second over the last minute, at most ${count(most)}`}>
      <path d="M0 40h240" />
      {points.length > 1 && <polyline points={points.join(' ')} />}
    </svg>
  );
}

function ModelCard({ one, looks }: { one: EngineModel; looks: Look[] }): VNode {
  const rates = looks.slice(1).map((each, at) => rate(looks[at] as Look, each, one.id, (m) => m.made_tokens));
  const read = looks.slice(-2);
  const reading = read.length === 2 ? rate(read[0] as Look, read[1] as Look, one.id, (m) => m.computed_tokens) : 0;
  const asked = one.computed_tokens + one.reused_tokens;
  const per = one.page_tokens;
  return (
    <section class="card" aria-label={one.id}>
      <h3>{one.id}</h3>
      <p class="hint">
        {[one.kernels, one.kv_type && 'cache in ' + one.kv_type, one.context_length && 'context ' + count(one.context_length)].filter(Boolean).join(' · ')}
      </p>
      <dl class="figures">
        <div>
          <dt>tokens/s</dt>
          <dd>{count(rates.at(-1) ?? 0)}</dd>
        </div>
        <div>
          <dt>answering</dt>
          <dd>{count(one.running)}</dd>
        </div>
        <div>
          <dt>waiting</dt>
          <dd>{count(one.waiting)}</dd>
        </div>
      </dl>
      <Curve values={rates} />
      <Pages
        used={one.pages_used}
        cached={one.pages_cached}
        free={one.pages_free}
        columns={32}
        label={`Pages of the cache: ${one.pages_used} in use, ${one.pages_cached} kept, ${one.pages_free} free`}
      />
      <ul class="legend">
        <li class="of-r">
          <b>{count(one.pages_used)}</b> in use
        </li>
        <li class="of-g">
          <b>{count(one.pages_cached)}</b> kept
        </li>
        <li class="of-none">
          <b>{count(one.pages_free)}</b> free
        </li>
        <li class="hint">pages of {count(per)} tokens</li>
      </ul>
      <dl class="lines">
        <div>
          <dt>Prompts from the cache</dt>
          <dd>
            {share(one.reused_tokens, asked)} <span class="hint">of {count(asked)}</span>
          </dd>
        </div>
        <div>
          <dt>Reading now</dt>
          <dd>{count(reading)} tokens/s</dd>
        </div>
        <div>
          <dt>Guesses that held</dt>
          <dd>
            {share(one.right_guesses, one.guessed_tokens)} <span class="hint">of {count(one.guessed_tokens)}</span>
          </dd>
        </div>
        <div>
          <dt>Made since the start</dt>
          <dd>{count(one.made_tokens)} tokens</dd>
        </div>
        <div>
          <dt>Set aside for want of pages</dt>
          <dd>{count(one.preemptions)}</dd>
        </div>
      </dl>
    </section>
  );
}

const STATES: Record<string, string> = { waiting: 'waits', reading: 'reads', answering: 'answers' };

export function EngineView(): VNode {
  const [looks, setLooks] = useState<Look[]>([]);
  const [trouble, setTrouble] = useState('');
  useEffect(() => {
    let open = true;
    let timer = 0;
    const look = async (): Promise<void> => {
      if (document.visibilityState === 'visible') {
        try {
          const engine = await lookAtEngine();
          if (!open) return;
          setTrouble('');
          setLooks((before) => [...before, { at: performance.now(), engine }].slice(-KEPT));
        } catch (error) {
          if (!open) return;
          if (!(error instanceof Refused)) throw error;
          if (error.status === 401 || error.status === 403) {
            mayWatch.value = false;
            panel.value = 'none';
            return;
          }
          setTrouble(error.message);
        }
      } else setLooks([]); // what passed meanwhile would be one long second
      timer = window.setTimeout(() => void look(), 1000);
    };
    void look();
    return () => {
      open = false;
      clearTimeout(timer);
    };
  }, []);
  const now = looks.at(-1)?.engine;
  const { resident, available } = now?.memory ?? { resident: 0, available: 0 };
  return (
    <aside class="panel engine" aria-label="The engine, live" id="engine">
      <header>
        <h2>Engine</h2>
        <button type="button" class="quiet" onClick={() => (panel.value = 'none')} aria-label="Close the engine's view">
          <Icon name="close" />
        </button>
      </header>
      <div class="inside">
        {trouble && <p class="warn">{trouble}</p>}
        {!now && !trouble && <p class="hint">Looking …</p>}
        {now && (
          <>
            {now.models.length === 0 && <p class="hint">No model is loaded. The first question loads one.</p>}
            {now.models.map((one) => (
              <ModelCard key={one.id} one={one} looks={looks} />
            ))}
            <section class="card" aria-label="Memory">
              <h3>Memory</h3>
              <Meter stitches={32} share={resident + available > 0 ? resident / (resident + available) : 0} label={`Memory: ${bytes(resident)} in use`} />
              <p>
                <b>{bytes(resident)}</b> in use, {bytes(available)} to be had
              </p>
              <p class="hint">up for {duration(now.uptime)}</p>
            </section>
            <section class="card" aria-label="Streams">
              <h3>Streams</h3>
              {now.streams.length === 0 ? (
                <p class="hint">Nothing is being answered.</p>
              ) : (
                <div class="wide" tabIndex={0} role="group" aria-label="Streams, a table">
                  <table>
                    <thead>
                      <tr>
                        <th>who</th>
                        <th>does</th>
                        <th class="right">prompt</th>
                        <th class="right">made</th>
                        <th class="right">for</th>
                      </tr>
                    </thead>
                    <tbody>
                      {now.streams.slice(0, ROWS).map((one) => (
                        <tr key={one.id} title={one.id + ' · ' + one.model}>
                          <td>{one.key || one.id}</td>
                          <td class={'state-' + (one.state in STATES ? one.state : 'other')}>{STATES[one.state] ?? one.state}</td>
                          <td class="right">{count(one.prompt_tokens)}</td>
                          <td class="right">{count(one.made_tokens)}</td>
                          <td class="right">{duration(one.seconds)}</td>
                        </tr>
                      ))}
                    </tbody>
                  </table>
                  {now.streams.length > ROWS && <p class="hint">and {count(now.streams.length - ROWS)} more</p>}
                </div>
              )}
            </section>
          </>
        )}
      </div>
    </aside>
  );
}
