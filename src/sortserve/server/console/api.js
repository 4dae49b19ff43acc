// What the page asks of its server: JSON, text, and answers as streams of events. One Api per key.

import { serverSentEvents } from "./sse.js";

/** An answer that is not 2xx, an error inside a stream, or no answer at all (`status` 0). */
export class ApiError extends Error {
  constructor(status, error, retryAfter = null) {
    super(error.message);
    this.status = status;
    this.type = error.type ?? null;
    this.code = error.code ?? null;
    this.param = error.param ?? null;
    this.retryAfter = retryAfter; // seconds
  }
}

export class Api {
  /** `key` is sent as a bearer token; empty for none. */
  constructor(key) {
    this.key = key;
  }

  /** The parsed JSON of a GET. Throws ApiError. */
  async json(path, signal) {
    return (await this.#fetch(path, { signal })).json();
  }

  /** The text of a GET. Throws ApiError. */
  async text(path, signal) {
    return (await this.#fetch(path, { signal, headers: { Accept: "text/plain" } })).text();
  }

  /** Start an answer: its response headers, and `chunks`, an async iterator of parsed chunks. Throws ApiError. */
  async generate(path, body, headers, signal) {
    const response = await this.#fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers },
      body: JSON.stringify(body),
      signal,
    });
    return { headers: response.headers, chunks: chunksOf(response.body) };
  }

  async #fetch(path, options) {
    const headers = { ...options.headers };
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers, cache: "no-store" });
    } catch (reason) {
      throw unreachable(reason);
    }
    if (response.ok) return response;
    const retryAfter = Number(response.headers.get("Retry-After")) || null;
    throw new ApiError(response.status, await errorObject(response), retryAfter);
  }
}

async function* chunksOf(stream) {
  try {
    for await (const data of serverSentEvents(stream)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(200, chunk.error);
      yield chunk;
    }
  } catch (reason) {
    throw reason instanceof ApiError ? reason : unreachable(reason);
  }
  throw new ApiError(0, { message: "The connection ended before the answer was complete.", code: "incomplete" });
}

/** The user's own stop stays what it is; anything else is a connection that failed. */
function unreachable(reason) {
  if (reason.name === "AbortError") return reason;
  return new ApiError(0, { message: "The server cannot be reached.", code: "unreachable" });
}

async function errorObject(response) {
  try {
    const { error } = await response.json();
    if (error?.message) return error;
  } catch {
    // a proxy's page, say: the status has to do
  }
  return { message: `HTTP ${response.status} ${response.statusText}`.trim(), code: "http_error" };
}
