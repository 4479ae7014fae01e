import openai, json
async def test_smoke(server):
    c = openai.AsyncOpenAI(base_url=server.url+"/v1", api_key="x")
    r = await c.chat.completions.create(model="tiny", messages=[{"role":"user","content":"hi"}])
    print(r.model_dump_json(indent=1))
    r = await c.chat.completions.create(model="tiny", messages=[{"role":"user","content":"hi"}], n=2, logprobs=True, top_logprobs=2, max_tokens=2)
    print(r.model_dump_json())
    s = await c.chat.completions.create(model="tiny", messages=[{"role":"user","content":"hi"}], stream=True, stream_options={"include_usage":True}, extra_body={"zzz":1})
    async for e in s: print(e.model_dump_json())
    s = await c.completions.create(model="tiny", prompt=["hi","ho"], stream=True, echo=True, max_tokens=3, logprobs=1)
    async for e in s: print(e.model_dump_json())
    r = await c.completions.create(model="tiny", prompt=[[5,6,7]], echo=True, max_tokens=1, logprobs=1)
    print(r.model_dump_json())
    await server.site.settle()
