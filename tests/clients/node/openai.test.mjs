// openai-node as its users use it, against the two servers of tests/clients/conftest.py.

import assert from 'node:assert/strict';
import { test } from 'node:test';

import OpenAI, { toFile } from 'openai';
import { zodResponseFormat, zodTextFormat } from 'openai/helpers/zod';
import { z } from 'zod';

const { REAL_URL, REAL_MODEL: model, SCRIPTED_URL, SCRIPTED_MODEL: scriptedModel } = process.env;
const options = { apiKey: 'any', maxRetries: 0, timeout: 100_000 };
const real = new OpenAI({ baseURL: `${REAL_URL}/v1`, ...options });
const scripted = new OpenAI({ baseURL: `${SCRIPTED_URL}/v1`, ...options });
const messages = [{ role: 'user', content: 'What is the capital of France?' }];
const user = (content) => [{ role: 'user', content }];

test('a chat completion', async () => {
  const answer = await real.chat.completions.create({ model, messages, temperature: 0 });
  assert.match(answer.choices[0].message.content, /Paris/);
  assert.equal(answer.choices[0].finish_reason, 'stop');
  const { prompt_tokens, completion_tokens, total_tokens } = answer.usage;
  assert.equal(prompt_tokens + completion_tokens, total_tokens);
});

test('a stream is the same completion', async () => {
  const body = { model, messages, temperature: 0 };
  const whole = await real.chat.completions.create(body);
  const stream = await real.chat.completions.create({
    ...body,
    stream: true,
    stream_options: { include_usage: true },
  });
  let text = '';
  let usage;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? '';
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
});

test('the streaming helper tells what comes and puts it together', async () => {
  const stream = real.chat.completions.stream({ model, messages, temperature: 0 });
  let text = '';
  stream.on('content', (delta) => (text += delta));
  const message = await stream.finalMessage();
  assert.equal(message.content, text);
  assert.match(text, /Paris/);
});

test('a completion of text, with log-probabilities', async () => {
  const answer = await real.completions.create({
    model,
    prompt: '1, 2, 3, 4,',
    max_tokens: 4,
    temperature: 0,
    logprobs: 2,
  });
  const { text, logprobs, finish_reason } = answer.choices[0];
  assert.equal(finish_reason, 'length');
  assert.equal(logprobs.tokens.join(''), text);
  assert.ok(logprobs.token_logprobs.every((value) => value <= 0));
});

test('models iterate', async () => {
  const names = [];
  for await (const one of real.models.list()) names.push(one.id);
  assert.ok(names.includes(model));
});

test('refusals are typed', async () => {
  await assert.rejects(
    real.chat.completions.create({ model, messages, temperature: -1 }),
    (error) =>
      error instanceof OpenAI.BadRequestError &&
      error.param === 'temperature' &&
      error.code === 'invalid_value' &&
      error.type === 'invalid_request_error' &&
      typeof error.requestID === 'string',
  );
  await assert.rejects(
    real.chat.completions.create({ model: 'gpt-17', messages, stream: true }),
    OpenAI.NotFoundError,
  );
});

test('a busy server is asked again when it said', async () => {
  const body = { model: scriptedModel, messages: user('busy node-1 say at last') };
  await assert.rejects(scripted.chat.completions.create(body), OpenAI.RateLimitError);
  body.messages = user('busy node-2 say at last');
  const began = performance.now();
  const answer = await scripted.chat.completions.create(body, { maxRetries: 1 });
  assert.equal(answer.choices[0].message.content, 'at last');
  assert.ok(performance.now() - began >= 990);
});

test('a stream can be left', async () => {
  const stream = await real.chat.completions.create({
    model,
    messages,
    max_tokens: 1500,
    ignore_eos: true,
    stream: true,
  });
  let seen = 0;
  for await (const _ of stream) if (++seen === 3) break;
  assert.equal(seen, 3);
  const controller = new AbortController();
  const left = real.chat.completions.create(
    { model, messages, max_tokens: 1500, ignore_eos: true },
    { signal: controller.signal },
  );
  setTimeout(() => controller.abort(), 100);
  await assert.rejects(left, OpenAI.APIUserAbortError);
});

test('a call of a tool, whole and streamed', async () => {
  const tools = ['f', 'g'].map((name) => ({
    type: 'function',
    function: { name, parameters: { type: 'object' } },
  }));
  const body = { model: scriptedModel, messages: user('call f {"a": "ü"}\ncall g {}'), tools };
  const whole = await scripted.chat.completions.create(body);
  const streamed = await scripted.chat.completions.stream(body).finalChatCompletion();
  for (const answer of [whole, streamed]) {
    const [choice] = answer.choices;
    assert.equal(choice.finish_reason, 'tool_calls');
    const calls = choice.message.tool_calls.map((call) => [
      call.function.name,
      JSON.parse(call.function.arguments),
    ]);
    assert.deepEqual(calls, [
      ['f', { a: 'ü' }],
      ['g', {}],
    ]);
  }
});

test('runTools calls the function and gives its result back', async () => {
  for (const stream of [false, true]) {
    const asked = [];
    const runner = scripted.chat.completions.runTools({
      model: scriptedModel,
      messages: user('call weather {"city": "Oslo"}'),
      stream,
      tools: [
        {
          type: 'function',
          function: {
            name: 'weather',
            description: 'The weather of a city',
            parameters: { type: 'object', properties: { city: { type: 'string' } } },
            parse: JSON.parse,
            function: ({ city }) => {
              asked.push(city);
              return 'rain';
            },
          },
        },
      ],
    });
    assert.equal(await runner.finalContent(), 'The tool said: rain');
    assert.deepEqual(asked, ['Oslo']);
  }
});

test('a file and a batch', async () => {
  const line = {
    custom_id: 'one',
    method: 'POST',
    url: '/v1/completions',
    body: { model, prompt: 'Once', max_tokens: 2 },
  };
  const file = await real.files.create({
    file: await toFile(Buffer.from(JSON.stringify(line)), 'in.jsonl'),
    purpose: 'batch',
  });
  assert.equal((await real.files.waitForProcessing(file.id)).status, 'processed');
  let batch = await real.batches.create({
    input_file_id: file.id,
    endpoint: '/v1/completions',
    completion_window: '24h',
  });
  while (['validating', 'in_progress', 'finalizing'].includes(batch.status)) {
    await new Promise((resolve) => setTimeout(resolve, 50));
    batch = await real.batches.retrieve(batch.id);
  }
  assert.equal(batch.status, 'completed');
  const rows = await (await real.files.content(batch.output_file_id)).text();
  assert.equal(JSON.parse(rows).response.status_code, 200);
  const ids = [];
  for await (const one of real.files.list({ limit: 1 })) ids.push(one.id);
  assert.ok(ids.includes(file.id));
  assert.equal((await real.files.delete(file.id)).deleted, true);
});

test('answers of a given shape are parsed', async () => {
  const Place = z.object({ kind: z.enum(['city', 'river']), big: z.boolean() });
  const completion = await real.chat.completions.parse({
    model,
    messages: [{ role: 'user', content: 'Paris' }],
    max_tokens: 100,
    temperature: 0,
    response_format: zodResponseFormat(Place, 'place'),
  });
  assert.equal(Place.safeParse(completion.choices[0].message.parsed).success, true);
  const response = await real.responses.parse({
    model,
    input: 'Paris',
    max_output_tokens: 100,
    temperature: 0,
    text: { format: zodTextFormat(Place, 'place') },
  });
  assert.equal(Place.safeParse(response.output_parsed).success, true);
});

test('a response, whole, streamed, kept and forgotten', async () => {
  const body = { model, input: 'What is the capital of France?', temperature: 0 };
  const whole = await real.responses.create(body);
  assert.match(whole.output_text, /Paris/);
  const final = await real.responses.stream(body).finalResponse();
  assert.equal(final.output_text, whole.output_text);
  assert.equal((await real.responses.retrieve(whole.id)).output_text, whole.output_text);
  await real.responses.delete(whole.id);
  await assert.rejects(real.responses.retrieve(whole.id), OpenAI.NotFoundError);
});

test('embeddings come as numbers, whatever went over the wire', async () => {
  const ask = (encoding_format) =>
    real.embeddings.create({ model, input: ['Hi', 'Ho'], encoding_format });
  const [plain, packed] = [await ask('float'), await ask(undefined)];
  assert.equal(plain.data.length, 2);
  plain.data[0].embedding.forEach((value, index) =>
    assert.ok(Math.abs(value - packed.data[0].embedding[index]) < 1e-5),
  );
});
