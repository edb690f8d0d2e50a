// One style sheet for all widgets, in the page's own colours.
export const CSS = `
.editkit { box-sizing: border-box; width: 100%; height: 100%; overflow: hidden; font: 12px/1.35 Inter, Arial, sans-serif;
  color: var(--input-text, #ddd); user-select: none; --ek: #ffd65a; --ek-dim: var(--descrip-text, #999);
  --ek-line: var(--border-color, #4e4e4e); --ek-back: var(--comfy-input-bg, #222); }
.editkit *, .editkit *::before { box-sizing: border-box; }
.ek-column { display: flex; flex-direction: column; gap: 4px; }
.ek-note { flex: none; min-height: 16px; color: var(--ek-dim); overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.ek-cards { flex: 1; min-height: 0; overflow-y: auto; display: grid; gap: 6px; align-content: start;
  grid-template-columns: repeat(var(--ek-columns, 3), minmax(0, 1fr)); scrollbar-width: thin; }
.ek-card { all: unset; box-sizing: border-box; cursor: pointer; padding: 4px; border-radius: 6px; background: var(--ek-back);
  border: 2px solid transparent; display: flex; flex-direction: column; gap: 3px; }
.ek-card:hover { border-color: var(--ek-line); }
.ek-card:focus-visible { outline: 2px solid #6fb3d2; outline-offset: -1px; }
.ek-card.ek-on { border-color: var(--ek); }
.ek-frame { position: relative; line-height: 0; }
.ek-frame img, .ek-frame canvas { width: 100%; display: block; border-radius: 3px; }
.ek-outline { position: absolute; inset: 0; height: 100%; }
.ek-bar { height: 5px; border-radius: 3px; background: rgba(128,128,128,.25); overflow: hidden; }
.ek-bar i { display: block; height: 100%; background: #7fb77e; }
.ek-on .ek-bar i { background: var(--ek); }
.ek-score { display: flex; justify-content: space-between; font-size: 11px; color: var(--ek-dim); }
.ek-score b { color: var(--input-text, #ddd); font-weight: 600; }
.ek-row { display: flex; gap: 4px; align-items: center; flex: none; min-width: 0; }
.ek-row > .ek-note { flex: 1; }
.ek-button { all: unset; box-sizing: border-box; cursor: pointer; padding: 2px 8px; border-radius: 4px; background: var(--ek-back);
  border: 1px solid var(--ek-line); color: var(--input-text, #ddd); white-space: nowrap; }
.ek-button:hover { border-color: var(--ek-dim); }
.ek-button:focus-visible, .ek-split:focus-visible + .ek-knob { outline: 2px solid #6fb3d2; }
.ek-button.ek-on { border-color: var(--ek); color: var(--ek); }
.ek-stage { position: relative; flex: 1; min-height: 0; overflow: hidden; border-radius: 4px; background: var(--ek-back);
  cursor: ew-resize; touch-action: none; }
.ek-stage img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; pointer-events: none; }
.ek-split { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; pointer-events: none; }
.ek-knob { position: absolute; top: 0; bottom: 0; width: 2px; margin-left: -1px; background: #fff; pointer-events: none;
  box-shadow: 0 0 3px #000; }
.ek-knob::before { content: ""; position: absolute; top: 50%; left: -8px; width: 18px; height: 18px; margin-top: -9px;
  border-radius: 50%; background: #fff; box-shadow: 0 0 3px #000; }
.ek-tag { position: absolute; top: 4px; padding: 0 5px; border-radius: 3px; background: rgba(0,0,0,.6); color: #fff; font-size: 11px;
  pointer-events: none; }
`;
