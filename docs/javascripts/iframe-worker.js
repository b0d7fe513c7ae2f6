// Search runs in a Worker, and browsers start none from a file. There it runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    #frame = document.createElement("iframe")
    #loaded

    constructor(url) {
      super()
      this.#frame.hidden = true
      document.body.append(this.#frame)
      const inside = this.#frame.contentWindow
      // as a worker's, its messages go to who started it
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      const script = inside.document.createElement("script")
      script.src = url
      this.#loaded = new Promise((resolve) => { script.onload = resolve })
      inside.document.body.append(script)
    }

    postMessage(data) {
      this.#loaded.then(() => this.#frame.contentWindow.dispatchEvent(
        new MessageEvent("message", { data: structuredClone(data) })))
    }

    terminate() {
      this.#frame.remove()
    }
  }
}
