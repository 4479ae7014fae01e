// Three charts of the last two minutes, drawn from /metrics while the page is in view.

import { readMetrics } from "./server.js";

const PERIOD = 1000; // ms between readings
const KEPT = 120; // readings

class Chart {
  /** `unit`: the least height of the axis, so that noise on an idle server looks like noise. */
  constructor(id, series, unit) {
    this.canvas = document.getElementById(id);
    this.output = document.getElementById(`${id}-now`);
    this.series = series.map((color) => ({ color, values: [] }));
    this.unit = unit;
  }

  add(text, ...values) {
    this.output.textContent = text;
    this.series.forEach(({ values: kept }, index) => {
      kept.push(values[index]);
      if (kept.length > KEPT) kept.shift();
    });
    this.draw();
  }

  draw() {
    const { canvas } = this;
    const scale = window.devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width) return; // not shown
    canvas.width = width * scale;
    canvas.height = height * scale;
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    pen.lineWidth = 1.5;
    pen.lineJoin = "round";
    const top = Math.max(this.unit, ...this.series.flatMap(({ values }) => values)) * 1.1;
    const style = getComputedStyle(canvas);
    for (const { color, values } of this.series) {
      if (!values.length) continue;
      const x = (index) => width - ((values.length - 1 - index) * width) / (KEPT - 1);
      const y = (value) => height - 1 - (value / top) * (height - 2);
      pen.strokeStyle = pen.fillStyle = style.getPropertyValue(color);
      pen.beginPath();
      values.forEach((value, index) => pen.lineTo(x(index), y(value)));
      pen.globalAlpha = 1;
      pen.stroke();
      pen.lineTo(width, height);
      pen.lineTo(x(0), height);
      pen.globalAlpha = 0.15;
      pen.fill();
    }
  }
}

/** Read and draw, again and again. */
export function startCharts() {
  const throughput = new Chart("throughput", ["--accent"], 10);
  const queue = new Chart("queue", ["--accent", "--second"], 4);
  const kv = new Chart("kv", ["--accent"], 0.1);
  const charts = [throughput, queue, kv];
  let last = null;

  async function read() {
    const samples = await readMetrics();
    const of = (name) => samples.get(`headrace_${name}`) ?? 0;
    const now = { at: performance.now(), tokens: of("generation_tokens_total") };
    // Counters start from zero again with the server.
    const tokens = last ? Math.max(0, now.tokens - last.tokens) : 0;
    const rate = last ? (tokens * 1000) / (now.at - last.at) : 0;
    last = now;
    const [running, waiting] = [of("requests_running"), of("requests_waiting")];
    const used = of("kv_cache_usage_ratio");
    throughput.add(`${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`, rate);
    queue.add(`${running} / ${waiting}`, running, waiting);
    kv.add(`${(used * 100).toFixed(1)} %`, used);
  }

  async function tick() {
    if (document.visibilityState === "visible") {
      try {
        await read();
      } catch {
        last = null;
        for (const { output } of charts) output.textContent = "no answer";
      }
    } else {
      last = null; // a rate over the time out of view would be drawn as one second's
    }
    setTimeout(tick, PERIOD);
  }

  const redraw = () => charts.forEach((chart) => chart.draw());
  new ResizeObserver(redraw).observe(throughput.canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  tick();
}
