() => {
  // Gradio's border between two images moves by mouse alone: the arrow keys stand in for one that is dragged
  const place = (handle) => handle.getBoundingClientRect().left - handle.parentElement.getBoundingClientRect().left;
  const tell = (handle) => {
    const share = (place(handle) + handle.offsetWidth / 2) / handle.parentElement.offsetWidth;
    handle.setAttribute("aria-valuenow", Math.round(100 * share));
  };
  const move = (handle, pixels) => {
    const box = handle.getBoundingClientRect();
    const [x, y] = [box.left + box.width / 2, box.top + box.height / 2];
    const send = (target, type, at) =>
      target.dispatchEvent(new MouseEvent(type, { clientX: at, clientY: y, view: window, bubbles: true, cancelable: true }));
    send(handle, "mousedown", x);
    send(window, "mousemove", x + pixels);
    send(window, "mouseup", x + pixels);
    requestAnimationFrame(() => tell(handle));
  };
  const adopt = () => document.querySelectorAll('[data-testid="slider"]:not([tabindex])').forEach((handle) => {
    handle.tabIndex = 0;
    const said = { role: "slider", "aria-label": "Border between before and after", "aria-valuemin": 0, "aria-valuemax": 100 };
    Object.entries(said).forEach(([name, value]) => handle.setAttribute(name, value));
    tell(handle);
    handle.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -20, ArrowRight: 20 }[event.key];
      if (!step) return;
      event.preventDefault();
      move(handle, step);
    });
  });
  new MutationObserver(adopt).observe(document.body, { childList: true, subtree: true });
  adopt();
}
