// Ollama's JavaScript client. Prints what checks.py prints.
import { Ollama } from 'ollama'

const { PUNA_URL, PUNA_KEY, PUNA_BASE_MODEL: base, PUNA_CHAT_MODEL: chat } = process.env
const client = new Ollama({ host: PUNA_URL, headers: { Authorization: `Bearer ${PUNA_KEY}` } })
const hello = [{ role: 'user', content: 'Say hello.' }]

function need(holds, what) {
  if (!holds) throw new Error(what)
}

const checks = {
  'list and show': async () => {
    need((await client.list()).models.some((model) => model.name === base), 'the model is not listed')
    need((await client.show({ model: chat })).details.family, 'no family')
  },
  'generate, whole and streamed alike': async () => {
    const asked = { model: base, prompt: 'Once upon a time', raw: true, options: { seed: 5, num_predict: 12 } }
    const whole = await client.generate(asked)
    let text = ''
    for await (const piece of await client.generate({ ...asked, stream: true })) text += piece.response
    need(text === whole.response && text.length > 0, 'the streamed text is another')
  },
  'chat, streamed': async () => {
    let last
    for await (const piece of await client.chat({ model: chat, messages: hello, stream: true, options: { num_predict: 4 } })) last = piece
    need(last.done && last.done_reason === 'length', 'no end')
  },
  embed: async () => {
    need((await client.embed({ model: base, input: ['the dog', 'a cat'] })).embeddings.length === 2, 'not two vectors')
  },
}

for (const [check, run] of Object.entries(checks)) {
  let failure = ''
  try {
    await run()
  } catch (error) {
    failure = String(error.stack ?? error)
  }
  console.log('\x1e' + JSON.stringify({ check, failure }))
}
