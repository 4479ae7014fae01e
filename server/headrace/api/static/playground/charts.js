// Three charts of the last minute, drawn from /metrics while the page is in view.

import { readMetrics } from "./server.js";

const PERIOD = 1000; // ms between readings
const KEPT = 60; // readings

class Chart {
  /**
   * `format`: a value as people read it. `least`: the axis is never shorter, so that noise on an
   * idle server looks like noise.
   */
  constructor(id, series, format, least) {
    this.canvas = document.getElementById(id);
    this.output = document.getElementById(`${id}-now`);
    this.series = series.map((color) => ({ color, values: [] }));
    this.format = format;
    this.least = least;
  }

  add(...values) {
    this.output.textContent = values.map(this.format).join(" / ");
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
    const top = Math.max(this.least, ...this.series.flatMap(({ values }) => values));
    const style = getComputedStyle(canvas);
    pen.font = `11px ${style.fontFamily}`;
    pen.textBaseline = "top";
    pen.fillStyle = style.getPropertyValue("--line");
    pen.fillRect(0, 0, width, 1);
    pen.fillStyle = style.getPropertyValue("--quiet");
    pen.fillText(this.format(top), 0, 3);
    for (const { color, values } of this.series) {
      if (!values.length) continue;
      const x = (index) => width - ((values.length - 1 - index) * width) / (KEPT - 1);
      const y = (value) => height - 1 - (value / top) * (height - 3);
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
  const rateText = (rate) => `${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`;
  const shareText = (share) => `${(share * 100).toFixed(share < 0.1 ? 1 : 0)} %`;
  const throughput = new Chart("throughput", ["--accent"], rateText, 10);
  const queue = new Chart("queue", ["--accent", "--second"], String, 4);
  const kv = new Chart("kv", ["--accent"], shareText, 0.1);
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
    throughput.add(rate);
    queue.add(of("requests_running"), of("requests_waiting"));
    kv.add(of("kv_cache_usage_ratio"));
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
