/**
 * The built page in headless Chromium, with the strict security policy that the server sends, against scripted answers.
 *
 * `make test-page` runs it. CHROMIUM says where the browser is (default /usr/bin/chromium); SHOTS names a folder for
 * screenshots. Surprising: each test watches for any request to another host, any script error and any word of the
 * policy's, and fails on the first.
 */

import assert from 'node:assert/strict';
import { existsSync, readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { serve } from './mock.mjs';

const require = createRequire(new URL('../../page/package.json', import.meta.url));
const { chromium } = require('playwright-core');
const AXE = readFileSync(require.resolve('axe-core/axe.min.js'), 'utf8');
const CHROMIUM = process.env.CHROMIUM ?? '/usr/bin/chromium';
const SHOTS = process.env.SHOTS;
const DOT = Buffer.from('iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==', 'base64');

let browser;
before(async () => {
  assert.ok(existsSync(CHROMIUM), `These tests need Chromium at ${CHROMIUM}; install it or say where it is with CHROMIUM=path.`);
  browser = await chromium.launch({
    executablePath: CHROMIUM,
    args: ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'],
  });
});
after(() => browser?.close());

/** Runs `how` with a page on a server of its own, and fails on whatever no page of ours may do. */
async function visit(how, { server = {}, context = {}, quiet = [] } = {}) {
  const mock = await serve(server);
  const visitor = await browser.newContext({ viewport: { width: 1280, height: 800 }, locale: 'en-GB', ...context });
  const faults = [];
  const watch = (page) => {
    page.setDefaultTimeout(Number(process.env.PATIENCE ?? 30_000));
    page.on('request', (request) => {
      if (!request.url().startsWith(mock.url) && !/^(data|blob):/.test(request.url())) faults.push('a request to ' + request.url());
    });
    page.on('pageerror', (error) => faults.push('a script error: ' + error.message));
    page.on('console', (message) => {
      if (['error', 'warning'].includes(message.type()) && !quiet.some((each) => message.text().includes(each))) faults.push(message.text());
    });
    return page;
  };
  try {
    const page = watch(await visitor.newPage());
    await page.goto(mock.url);
    if (!server.key) await page.getByRole('button', { name: /^Model: llama3.2:3b/ }).waitFor();
    await how({ page, mock, visitor, watch });
    assert.deepEqual(faults, []);
  } finally {
    await visitor.close();
    await mock.close();
  }
}

const field = (page) => page.getByRole('textbox', { name: /^(Message|Text for the model)/ });
const answers = (page) => page.locator('.turn.assistant');
const idle = (page) => page.locator('.composer button[type=submit]').waitFor();

async function say(page, text) {
  await field(page).fill(text);
  await field(page).press('Enter');
  await idle(page);
}

/** Waits until `asked`, which may take a while itself, says yes. Playwright's own wait takes a promise for a yes. */
async function until(asked) {
  for (let tries = 0; tries < 300; tries++) {
    if (await asked()) return;
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  assert.fail('it never was so: ' + asked);
}

/** Waits until a turn of this text is in the browser's store. */
const kept = (page, text) =>
  until(() =>
    page.evaluate(
      (wanted) =>
        new Promise((resolve) => {
          const open = indexedDB.open('puna');
          open.onsuccess = () => {
            const all = open.result.transaction('conversations').objectStore('conversations').getAll();
            all.onsuccess = () => {
              open.result.close();
              resolve(all.result.some((one) => one.turns.some((turn) => turn.text === wanted)));
            };
          };
        }),
      text,
    ),
  );

/** Two pictures, one wide and one high, as a browser draws and packs them. */
const pictures = (page) =>
  Promise.all(
    [['mountains.png', 640, 360], ['tower.jpg', 240, 480]].map(async ([name, width, height]) => {
      const mimeType = name.endsWith('png') ? 'image/png' : 'image/jpeg';
      const url = await page.evaluate(
        ([width, height, kind]) => {
          const canvas = Object.assign(document.createElement('canvas'), { width, height });
          const draw = canvas.getContext('2d');
          const sky = draw.createLinearGradient(0, 0, 0, height);
          sky.addColorStop(0, '#6fa6c8');
          sky.addColorStop(1, '#f3d9b1');
          draw.fillStyle = sky;
          draw.fillRect(0, 0, width, height);
          draw.fillStyle = '#31505c';
          draw.beginPath();
          for (const [x, y] of [[0, 1], [0.3, 0.35], [0.5, 0.7], [0.72, 0.25], [1, 1]]) draw.lineTo(x * width, y * height);
          draw.fill();
          return canvas.toDataURL(kind);
        },
        [width, height, mimeType],
      );
      return { name, mimeType, buffer: Buffer.from(url.split(',')[1], 'base64') };
    }),
  );

const shot = (page, name) => (SHOTS ? page.screenshot({ path: join(SHOTS, name + '.png') }) : undefined);

describe('a conversation', () => {
  test('is asked, streamed, drawn, and counted', () =>
    visit(async ({ page, mock }) => {
      await say(page, 'Tell me of bloom filters');
      const answer = answers(page).first();
      assert.equal(await answer.locator('.prose h3').textContent(), 'How it works');
      assert.equal(await answer.locator('.hljs-keyword').first().textContent(), 'from');
      assert.equal(await answer.locator('td.right').first().textContent(), '8');
      assert.match(await answer.locator('.cost').innerText(), /192\s+tokens[\s\S]*tokens\/s[\s\S]*24 of \d+ reused[\s\S]*context \d+ of 8,192/);
      assert.deepEqual(Object.keys(mock.requests[0].body).sort(), ['messages', 'model', 'stream', 'stream_options']);
      assert.deepEqual(mock.requests[0].body.messages, [{ role: 'user', content: 'Tell me of bloom filters' }]);
      await say(page, 'And more');
      assert.deepEqual(mock.requests[1].body.messages.map((each) => each.role), ['user', 'assistant', 'user']);
      assert.equal(await page.title(), 'Tell me of bloom filters · Puna');
    }));

  test('shows words while they come, and stops', () =>
    visit(async ({ page, mock }) => {
      await field(page).fill('hold on');
      await field(page).press('Enter');
      await answers(page).getByText('It begins and').waitFor();
      assert.equal(await answers(page).getAttribute('aria-busy'), 'true');
      await page.getByRole('button', { name: 'Stop' }).click();
      await page.getByText('Stopped by you.').waitFor();
      assert.equal(await answers(page).locator('.prose').innerText(), 'It begins and');
      // and by the keyboard
      await field(page).fill('hold again');
      await field(page).press('Enter');
      await answers(page).nth(1).getByText('It begins and').waitFor();
      await page.keyboard.press('Escape');
      await page.getByText('Stopped by you.').nth(1).waitFor();
      // one that goes on is whole
      await field(page).fill('hold a third time');
      await field(page).press('Enter');
      await answers(page).nth(2).getByText('It begins and').waitFor();
      mock.release();
      await answers(page).nth(2).getByText('It begins and it ends.').waitFor();
    }));

  test('has versions of answers and messages, and brings branches back', () =>
    visit(async ({ page, mock }) => {
      await say(page, 'first');
      await say(page, 'second');
      await answers(page).nth(1).getByRole('button', { name: 'Again' }).click();
      await answers(page).nth(1).getByText('Answer 3.').waitFor();
      await idle(page);
      assert.deepEqual(mock.requests[2].body.messages, mock.requests[1].body.messages);
      await page.keyboard.press('Alt+ArrowLeft');
      await answers(page).nth(1).getByText('Answer 2.').waitFor();
      // the first message, said otherwise
      await page.getByRole('button', { name: 'Edit this message' }).first().click();
      await page.getByRole('textbox', { name: 'Your message, to be asked anew' }).fill('FIRST');
      await page.keyboard.press('Enter');
      await answers(page).first().getByText('Answer 4. You said: FIRST').waitFor();
      await idle(page);
      assert.equal(await answers(page).count(), 1);
      assert.deepEqual(mock.requests[3].body.messages, [{ role: 'user', content: 'FIRST' }]);
      // and back: with the branch below, and the version that was looked at there
      await page.locator('.turn.user').first().getByRole('button', { name: 'Version before' }).click();
      await answers(page).nth(1).getByText('Answer 2.').waitFor();
      assert.equal(await page.locator('.turn.assistant').nth(1).locator('.versions').innerText().then((text) => text.replace(/\s/g, '')), '1/of2');
      // an answer rewritten is a version that is not asked for
      await answers(page).nth(1).getByRole('button', { name: 'Edit this answer' }).click();
      await page.getByRole('textbox', { name: /The answer/ }).fill('My own words');
      await page.getByRole('button', { name: 'Keep as a version' }).click();
      await answers(page).nth(1).getByText('My own words').waitFor();
      assert.equal(mock.requests.length, 4);
    }));

  test('outlives a reload, with its branches, in every tab', () =>
    visit(async ({ page, mock, visitor, watch }) => {
      await say(page, 'keep this');
      await answers(page).getByRole('button', { name: 'Again' }).click();
      await answers(page).getByText('Answer 2.').waitFor();
      await idle(page);
      await page.reload();
      await answers(page).getByText('Answer 2.').waitFor();
      await page.getByRole('button', { name: 'Version before' }).click();
      await answers(page).getByText('Answer 1.').waitFor();
      const other = watch(await visitor.newPage());
      await other.goto(page.url());
      await answers(other).getByText('You said: keep this').waitFor();
      await say(other, 'from the other tab');
      await answers(page).getByText('You said: from the other tab').waitFor();
      // closed in the middle of an answer: what came is there, and says what it is
      await field(page).fill('hold');
      await field(page).press('Enter');
      await answers(page).nth(2).getByText('It begins and').waitFor();
      await kept(page, 'It begins and');
      await page.reload();
      await page.getByText('Incomplete: the page was closed').waitFor();
      assert.equal(await answers(page).nth(2).locator('.prose').innerText(), 'It begins and');
      mock.release();
    }));

  test('calls of tools are code', () =>
    visit(async ({ page }) => {
      await say(page, 'weather?');
      await page.getByText('Asks for the tool get_weather').waitFor();
      assert.equal(await page.locator('.call code').last().textContent(), '{\n  "city": "La Paz",\n  "unit": "celsius"\n}');
    }));

  test('a cut answer says why', () =>
    visit(async ({ page }) => {
      await say(page, 'long');
      await page.getByText('Cut off: the limit of tokens was reached').waitFor();
    }));
});

describe('trouble', () => {
  test('a refusal shows the server\'s words, and asking again takes its place', () =>
    visit(async ({ page, mock }) => {
      await say(page, 'refuse');
      await page.locator('.trouble').getByText('temperature is 9, which is above 2. Choose one from 0 to 2.').waitFor();
      await page.getByRole('button', { name: 'Ask again' }).click();
      await page.waitForFunction(() => document.querySelectorAll('.turn.assistant').length === 1);
      await idle(page);
      assert.equal(mock.requests.length, 2);
      assert.equal(await page.locator('.versions').count(), 0);
    }, { quiet: ['400'] }));

  test('what a guard keeps back is told as that, kept, and is no answer', () =>
    visit(async ({ page, mock }) => {
      await say(page, 'unsafe');
      const note = answers(page).first().getByRole('note');
      assert.match(await note.innerText(), /Kept back by this server’s guard\s+What was asked was kept back: the guard found it unsafe: S9/);
      await page.getByRole('status').getByText('No answer. What was asked was kept back').waitFor();
      assert.equal(await answers(page).first().locator('.prose').count(), 0);
      assert.equal(await answers(page).first().getByRole('button', { name: /Copy/ }).count(), 0);
      await say(page, 'decline');
      assert.match(await answers(page).nth(1).getByRole('note').innerText(), /Declined\s+I cannot help with that\./);
      assert.deepEqual(mock.requests[1].body.messages[1], {
        role: 'assistant', content: null,
        refusal: 'What was asked was kept back: the guard found it unsafe: S9 (Indiscriminate Weapons).',
      });
      await kept(page, 'decline');
      await page.reload();
      await answers(page).nth(1).getByText('I cannot help with that.').waitFor();
    }));

  for (const [word, said] of [
    ['midway', 'The engine stopped: out of pages. Ask again with a smaller max_tokens.'],
    ['broken', 'The connection broke'],
    ['endless', 'The answer stopped without an end'],
  ])
    test(`an answer that breaks off (${word}) keeps what came`, () =>
      visit(async ({ page, mock }) => {
        await field(page).fill(word);
        await field(page).press('Enter');
        // What a browser has not handed on yet when a connection breaks, it throws away.
        await answers(page).getByText('Half of it').waitFor();
        mock.release();
        await idle(page);
        await page.locator('.trouble').getByText(said).waitFor();
        assert.equal(await answers(page).locator('.prose').innerText(), 'Half of it');
        await page.locator('.trouble').getByText('This answer is incomplete.', { exact: true }).waitFor();
      }, { quiet: ['ERR_INCOMPLETE_CHUNKED_ENCODING'] }));

  test('a server that is gone', () =>
    visit(async ({ page, mock }) => {
      await mock.close();
      await say(page, 'anyone?');
      await page.locator('.trouble').getByText('The server cannot be reached. Is `puna serve` still running?').waitFor();
    }, { quiet: ['ERR_CONNECTION'] }));
});

test('what a model writes runs nothing and asks for nothing', () =>
  visit(async ({ page, mock }) => {
    await page.evaluate(() => {
      window.blocked = [];
      document.addEventListener('securitypolicyviolation', (event) => window.blocked.push(event.violatedDirective));
    });
    const before = mock.seen.length;
    await say(page, 'hostile');
    const answer = answers(page).first();
    await answer.getByText('<script>window.hurt = 1</script>').waitFor();
    await answer.getByText('The end.').waitFor();
    assert.equal(await page.evaluate(() => window.hurt), undefined);
    assert.deepEqual(await page.evaluate(() => window.blocked), []); // it never came to the policy
    const inside = answer.locator('.said');
    assert.equal(await inside.locator('script, img, iframe, style, object, embed, svg:not(.icon):not(.knit), [style], form, input').count(), 0);
    const links = await inside.locator('a').evaluateAll((all) => all.map((each) => [each.href, each.rel, each.target]));
    for (const [href, rel, target] of links) {
      assert.match(href, /^https?:\/\//);
      assert.match(rel, /noopener/);
      assert.equal(target, '_blank');
    }
    assert.deepEqual(links.map(([href]) => href), [
      'https://example.com/a?b=c', 'http://127.0.0.1:1/pixel.png', 'https://example.com/auto', 'https://example.com/bare',
    ]);
    const handlers = await inside.evaluate((root) => [...root.querySelectorAll('*')].flatMap((each) => each.getAttributeNames()).filter((name) => name.startsWith('on')));
    assert.deepEqual(handlers, []);
    assert.deepEqual(mock.seen.slice(before).filter((path) => !path.startsWith('/page/')), ['/v1/chat/completions']);
    // nor do a title and a message of the same kind
    await say(page, '<img src=x onerror="window.hurt=11"><script>window.hurt=12</script>');
    await page.getByRole('button', { name: 'Rename' }).click();
    await page.getByRole('textbox', { name: 'Name of this conversation' }).fill('<img src=x onerror="window.hurt=13">');
    await page.keyboard.press('Enter');
    await page.locator('.list .title').getByText('<img src=x').waitFor();
    assert.equal(await page.evaluate(() => window.hurt), undefined);
  }));

describe('the key', () => {
  test('is asked for, checked, sent, and gone with the tab', () =>
    visit(async ({ page, mock }) => {
      const dialog = page.getByRole('dialog', { name: 'A key, please' });
      await dialog.waitFor();
      await dialog.getByLabel('API key').fill('wrong');
      await page.keyboard.press('Enter');
      await page.getByRole('alert').getByText('This key is not known here.').waitFor();
      await dialog.getByLabel('API key').fill('sesame');
      await dialog.getByRole('button', { name: 'Use this key' }).click();
      await page.getByRole('button', { name: /^Model: llama3.2:3b/ }).waitFor();
      await say(page, 'hello');
      await answers(page).getByText('You said: hello').waitFor();
      assert.equal(mock.requests[0].key, 'Bearer sesame');
      assert.equal(await page.evaluate(() => localStorage.getItem('puna.key')), null);
      await page.reload(); // the same tab still has it
      await page.getByRole('button', { name: /^Model: llama3.2:3b/ }).waitFor();
      await page.getByRole('button', { name: 'Forget key' }).click();
      await dialog.waitFor();
      assert.equal(await page.evaluate(() => sessionStorage.getItem('puna.key')), null);
    }, { server: { key: 'sesame' }, quiet: ['401'] }));

  test('is remembered where one says so', () =>
    visit(async ({ page, mock, visitor, watch }) => {
      await page.getByLabel('API key').fill('sesame');
      await page.getByRole('checkbox', { name: /Remember/ }).check();
      await page.keyboard.press('Enter');
      await page.getByRole('button', { name: /^Model: llama3.2:3b/ }).waitFor();
      const other = watch(await visitor.newPage());
      await other.goto(mock.url);
      await other.getByRole('button', { name: /^Model: llama3.2:3b/ }).waitFor();
    }, { server: { key: 'sesame' }, quiet: ['401'] }));
});

describe('settings', () => {
  test('only what is filled in is sent; what is wrong is said and not sent', () =>
    visit(async ({ page, mock }) => {
      await page.keyboard.press('Alt+KeyS');
      for (const [name, value] of [['System prompt', 'Be brief.'], ['Temperature', '0'], ['Top p', '0.9'], ['Top k', '40'], ['Min p', '0.05'], ['Repetition penalty', '1.1'], ['Max tokens', '64'], ['Seed', '7'], ['Stop at', 'END\n###']])
        await page.getByLabel(name, { exact: true }).fill(value);
      await say(page, 'hello');
      const { messages, model, stream, stream_options, ...rest } = mock.requests[0].body;
      assert.deepEqual(rest, { temperature: 0, top_p: 0.9, top_k: 40, min_p: 0.05, repetition_penalty: 1.1, max_tokens: 64, seed: 7, stop: ['END', '###'] });
      assert.deepEqual(messages[0], { role: 'system', content: 'Be brief.' });
      assert.deepEqual([model, stream, stream_options], ['llama3.2:3b', true, { include_usage: true }]);
      await page.getByRole('button', { name: 'Keep for new conversations' }).click();
      await page.keyboard.press('Alt+KeyN');
      assert.equal(await page.getByLabel('Seed', { exact: true }).inputValue(), '7');
      await page.getByRole('button', { name: 'All to default' }).click();
      await page.getByLabel('Top k', { exact: true }).fill('3.5');
      await page.getByText('Not a whole number, so it is not sent.').waitFor();
      await say(page, 'hello again');
      assert.deepEqual(Object.keys(mock.requests[1].body).sort(), ['messages', 'model', 'stream', 'stream_options']);
    }));
});

describe('models', () => {
  test('the picker says what is loaded, what fits and why not', () =>
    visit(async ({ page, mock }) => {
      await page.keyboard.press('Alt+KeyM');
      const dialog = page.getByRole('dialog', { name: 'Models' });
      assert.match(await dialog.getByRole('button', { name: /^llama3.2:3b/ }).innerText(), /loaded[\s\S]*3\.2\sB\sparameters · Q4_K_M · 2\.0\sGB · context\s8,192/);
      const large = dialog.getByRole('button', { name: /^llama3.3:70b/ });
      assert.ok(await large.isDisabled());
      assert.match(await large.innerText(), /does not fit[\s\S]*19\.6 GB are to be had/);
      await page.keyboard.press('ArrowDown'); // from the one that is chosen
      await page.keyboard.press('Enter');
      await dialog.waitFor({ state: 'hidden' });
      await page.getByRole('button', { name: /^Model: llama3.2-vision:11b/ }).waitFor();
      await say(page, 'hello');
      assert.equal(mock.requests[0].body.model, 'llama3.2-vision:11b');
    }));

  test('pictures go to a model that sees, and to no other', () =>
    visit(async ({ page, mock }) => {
      assert.equal(await page.getByRole('button', { name: 'Attach a picture' }).count(), 0);
      await page.keyboard.press('Alt+KeyM');
      await page.getByRole('button', { name: /^llama3.2-vision/ }).click();
      const chooser = page.waitForEvent('filechooser');
      await page.getByRole('button', { name: 'Attach a picture' }).click();
      await (await chooser).setFiles([
        { name: 'large.png', mimeType: 'image/png', buffer: Buffer.alloc(11_300_000) },
        { name: 'dot.png', mimeType: 'image/png', buffer: DOT },
        { name: 'evil.svg', mimeType: 'image/svg+xml', buffer: Buffer.from('<svg xmlns="http://www.w3.org/2000/svg" onload="window.hurt=1"/>') },
      ]);
      await page.getByRole('img', { name: 'dot.png' }).waitFor();
      await page.locator('.notice').getByText('evil.svg is no PNG, JPEG, WebP or GIF').waitFor();
      await page.getByRole('status').getByText('Attached: dot.png.').waitFor();
      // pasted and dropped ones come too, and one is taken away again
      for (const [how, of] of [['paste', 'textarea'], ['drop', '.composer']])
        await page.evaluate(
          async ([how, of, base64]) => {
            const data = new DataTransfer();
            const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
            data.items.add(new File([bytes], how + '.png', { type: 'image/png' }));
            const about = { bubbles: true, cancelable: true };
            const event = how === 'paste' ? new ClipboardEvent('paste', { ...about, clipboardData: data }) : new DragEvent('drop', { ...about, dataTransfer: data });
            document.querySelector(of).dispatchEvent(event);
          },
          [how, of, DOT.toString('base64')],
        );
      for (const how of ['paste', 'drop']) {
        await page.getByRole('img', { name: how + '.png' }).waitFor();
        await page.getByRole('button', { name: `Take ${how}.png away` }).click();
      }
      assert.equal(await page.locator('.composer img').count(), 1);
      await say(page, 'What is this?');
      assert.deepEqual(mock.requests[0].body.messages[0].content, [
        { type: 'image_url', image_url: { url: 'data:image/png;base64,' + DOT.toString('base64') } },
        { type: 'text', text: 'What is this?' },
      ]);
      await page.keyboard.press('Alt+KeyM');
      await page.getByRole('button', { name: /^llama3.2:3b/ }).click();
      await say(page, 'And now?');
      await page.locator('.notice').getByText('llama3.2:3b does not see pictures.').waitFor();
      assert.equal(await field(page).inputValue(), 'And now?'); // nothing is lost
      assert.equal(mock.requests.length, 1);
    }));

  test('a base model goes on with a text', () =>
    visit(async ({ page, mock }) => {
      await page.keyboard.press('Alt+KeyM');
      await page.getByRole('button', { name: /^cria/ }).click();
      await say(page, 'Once upon a time');
      assert.match(await page.locator('.sheet').innerText(), /^Once upon a time there was a little llama .* mother\.$/);
      assert.equal(mock.requests[0].path, '/v1/completions');
      assert.equal(mock.requests[0].body.prompt, 'Once upon a time');
      await field(page).press('Enter'); // without a word: it goes on
      await idle(page);
      assert.match(mock.requests[1].body.prompt, /^Once upon a time there was .* mother\.$/);
      await say(page, ' The end came when');
      assert.match(mock.requests[2].body.prompt, /mother\. there was .* mother\. The end came when$/);
      await page.getByRole('button', { name: 'Again' }).click();
      await page.locator('.versions').waitFor();
      assert.equal(mock.requests[3].body.prompt, mock.requests[2].body.prompt);
    }));
});

describe('the list', () => {
  test('finds, renames, deletes', () =>
    visit(async ({ page }) => {
      await say(page, 'the vicuña');
      await page.keyboard.press('Alt+KeyN');
      await say(page, 'the guanaco');
      await page.keyboard.press('Control+KeyK');
      await page.keyboard.type('VICUÑA answer');
      await page.waitForFunction(() => document.querySelectorAll('.list .title').length === 1);
      await page.keyboard.press('Enter');
      await answers(page).getByText('You said: the vicuña').waitFor();
      await page.getByRole('button', { name: 'Rename' }).click();
      await page.keyboard.type('Camelids');
      await page.keyboard.press('Enter');
      await page.getByRole('link', { name: /^Camelids/ }).waitFor();
      await page.getByRole('searchbox').fill('');
      await page.getByRole('button', { name: 'Delete this conversation' }).click();
      await page.getByRole('button', { name: 'Delete', exact: true }).click();
      await page.locator('.notice').getByText('“Camelids” is deleted.').waitFor();
      await page.reload();
      await page.getByRole('link', { name: /^the guanaco/ }).waitFor();
      assert.equal(await page.locator('.list a').count(), 1);
      // back and forth as in any site
      await page.getByRole('link', { name: /^the guanaco/ }).click();
      await answers(page).waitFor();
      await page.goBack();
      await page.getByRole('heading', { name: 'Ask something.' }).waitFor();
    }));

  test('goes out and comes back in', () =>
    visit(async ({ page }) => {
      await say(page, 'bloom');
      const download = async (name) => {
        const wait = page.waitForEvent('download');
        await page.getByRole('button', { name }).click();
        const file = await wait;
        return [file.suggestedFilename(), readFileSync(await file.path(), 'utf8')];
      };
      const [markdown, text] = await download('Export as Markdown');
      assert.equal(markdown, 'bloom.md');
      assert.match(text, /^# bloom\n\n## You\n\nbloom\n\n## llama3.2:3b\n\nA \*\*Bloom filter\*\*/);
      const [json, whole] = await download('Export as JSON');
      assert.equal(json, 'bloom.json');
      const importing = async (name, content) => {
        const chooser = page.waitForEvent('filechooser');
        await page.getByRole('button', { name: 'Import' }).click();
        await (await chooser).setFiles([{ name, mimeType: 'application/json', buffer: Buffer.from(content) }]);
      };
      await importing('bloom.json', whole);
      await page.locator('.notice').getByText('One conversation is imported.').waitFor();
      assert.equal(await page.locator('.list a').count(), 2);
      await importing('evil.json', whole.replace('"role": "user"', '"role": "root"'));
      await page.locator('.notice').getByText('Nothing is imported. conversations[0].turns[0].role is neither user nor assistant.').waitFor();
      assert.equal(await page.locator('.list a').count(), 2);
      await page.reload();
      await page.waitForFunction(() => document.querySelectorAll('.list a').length === 2);
    }));
});

describe('the engine', () => {
  test('is seen by its owner', () =>
    visit(async ({ page }) => {
      await page.keyboard.press('Alt+KeyE');
      const panel = page.getByRole('complementary', { name: 'The engine, live' });
      await panel.getByRole('img', { name: 'Pages of the cache: 141 in use, 203 kept, 168 free' }).waitFor();
      assert.equal(await panel.getByRole('row').count(), 5);
      await panel.getByText('3.1 GB').waitFor();
      await page.waitForFunction(() => Number(document.querySelector('.figures dd')?.textContent) > 50); // a rate needs two looks
    }));

  test('and by nobody else', () =>
    visit(async ({ page, mock }) => {
      await page.waitForFunction(() => document.querySelector('.under')?.textContent?.includes('0.1.0')); // asked after the engine
      assert.ok(mock.seen.includes('/puna/engine'));
      assert.equal(await page.getByRole('button', { name: 'Engine' }).count(), 0);
      await page.keyboard.press('Alt+KeyE');
      assert.equal(await page.getByRole('complementary').count(), 0);
    }, { server: { watch: false }, quiet: ['403'] }));
});

describe('hands and eyes', () => {
  test('everything by the keyboard', () =>
    visit(async ({ page }) => {
      assert.equal(await page.evaluate(() => document.activeElement?.id), 'say');
      await page.keyboard.type('? is no shortcut while one writes');
      assert.equal(await page.getByRole('dialog').count(), 0);
      await page.evaluate(() => document.activeElement?.blur());
      await page.keyboard.press('?');
      const dialog = page.getByRole('dialog', { name: 'Keyboard' });
      await dialog.getByText('New conversation').waitFor();
      await page.keyboard.press('Escape');
      await dialog.waitFor({ state: 'hidden' });
      await page.keyboard.press('/');
      assert.equal(await page.evaluate(() => document.activeElement?.id), 'say');
      await page.keyboard.press('Enter');
      await idle(page);
      await page.keyboard.press('Alt+KeyR');
      await page.locator('.versions').waitFor();
      await idle(page);
      await page.keyboard.press('Alt+ArrowUp');
      await page.getByRole('textbox', { name: 'Your message, to be asked anew' }).waitFor();
      await page.keyboard.press('Escape');
      await page.getByRole('textbox', { name: 'Your message, to be asked anew' }).waitFor({ state: 'hidden' });
      // Tab reaches what can be pressed, and shows where it is
      await page.keyboard.press('Tab');
      assert.notEqual(await page.evaluate(() => getComputedStyle(document.activeElement).outlineStyle), 'none');
    }));

  test('code and answers are copied', () =>
    visit(async ({ page }) => {
      await say(page, 'bloom');
      await page.getByRole('button', { name: 'Copy this code' }).click();
      await page.getByRole('button', { name: 'Copied' }).waitFor();
      assert.match(await page.evaluate(() => navigator.clipboard.readText()), /^from hashlib import blake2b\n[\s\S]*place & 7\)$/);
      await page.getByRole('button', { name: 'Copy this answer' }).click();
      await until(async () => (await page.evaluate(() => navigator.clipboard.readText())).startsWith('A **Bloom filter**'));
    }, { context: { permissions: ['clipboard-read', 'clipboard-write'] } }));

  test('a screen reader hears of the answer once it is whole', () =>
    visit(async ({ page }) => {
      await say(page, 'hello');
      await page.getByRole('status').getByText('The answer: Answer 1. You said: hello').waitFor();
    }));

  const LOOKS = [
    ['light', { colorScheme: 'light' }],
    ['dark', { colorScheme: 'dark' }],
    ['mobile', { colorScheme: 'light', viewport: { width: 390, height: 844 }, isMobile: true, hasTouch: true }],
    ['mobile-dark', { colorScheme: 'dark', viewport: { width: 390, height: 844 }, isMobile: true, hasTouch: true }],
  ];
  for (const [look, context] of LOOKS)
    test(`no fault that axe finds, and nothing wider than the screen: ${look}`, () =>
      visit(async ({ page }) => {
        const check = async (name) => {
          await shot(page, `${look}-${name}`);
          assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), `${name} is wider than the screen`);
          await page.evaluate(AXE);
          const { violations } = await page.evaluate(() => window.axe.run(document, { runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice'] }));
          assert.deepEqual(violations.map((each) => [name, each.id, each.nodes.map((node) => node.target.join(' ') + ': ' + node.failureSummary)]), []);
        };
        const touch = context.hasTouch === true;
        const send = async (text) => {
          await field(page).fill(text);
          await page.getByRole('button', { name: 'Send' }).click();
          await idle(page);
        };
        await check('empty');
        await send('Explain a bloom filter');
        await answers(page).getByRole('button', { name: 'Again' }).click();
        await page.locator('.versions').waitFor();
        await idle(page);
        await check('chat');
        await send('weather in La Paz?');
        await send('midway');
        await check('trouble');
        await page.getByRole('button', { name: 'Edit this message' }).last().click();
        await check('edit');
        await page.keyboard.press('Escape');
        await send('unsafe');
        await check('kept-back');
        await page.getByRole('button', { name: 'Settings' }).click();
        await check('settings');
        await page.getByRole('button', { name: 'Close the settings' }).click();
        await page.getByRole('button', { name: 'Engine' }).click();
        await page.waitForFunction(() => document.querySelector('.curve polyline') !== null);
        await check('engine');
        await page.getByRole('button', { name: /Close the engine/ }).click();
        await page.getByRole('button', { name: /^Model:/ }).click();
        await check('models');
        await page.getByRole('button', { name: /^llama3.2-vision/ }).click();
        const chooser = page.waitForEvent('filechooser');
        await page.getByRole('button', { name: 'Attach a picture' }).click();
        await (await chooser).setFiles(await pictures(page));
        await page.locator('.composer img').nth(1).waitFor();
        await check('attached');
        await send('What is on these?');
        await page.getByRole('button', { name: 'Edit this message' }).last().click();
        await check('pictures');
        await page.keyboard.press('Escape');
        await page.getByRole('button', { name: /^Model:/ }).click();
        await page.getByRole('button', { name: /^cria/ }).click();
        if (touch) {
          await page.getByRole('button', { name: 'Conversations' }).click();
          await check('list');
        }
        await page.getByRole('button', { name: 'Keyboard shortcuts' }).click();
        await check('keys');
        await page.keyboard.press('Escape');
        await page.getByRole('button', { name: 'New conversation' }).click();
        await field(page).fill('Once upon a time');
        await page.getByRole('button', { name: 'Go on' }).click();
        await idle(page);
        await check('base');
      }, { context }));

  test('colours are chosen, and kept', () =>
    visit(async ({ page }) => {
      const ground = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
      const light = await ground();
      await page.getByRole('radio', { name: 'Dark' }).check();
      const dark = await ground();
      assert.notEqual(dark, light);
      await page.reload();
      await page.getByRole('radio', { name: 'Dark', checked: true }).waitFor();
      assert.equal(await ground(), dark);
    }, { context: { colorScheme: 'light' } }));

  test('who wants no motion has none', () =>
    visit(async ({ page, mock }) => {
      await field(page).fill('hold');
      await field(page).press('Enter');
      await answers(page).waitFor();
      assert.deepEqual(await page.evaluate(() => document.getAnimations().length), 0);
      mock.release();
    }, { context: { reducedMotion: 'reduce' } }));
});
