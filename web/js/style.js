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
`;
