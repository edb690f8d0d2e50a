// One style sheet for all widgets, in the page's own colours.
export const CSS = `
.editkit{box-sizing:border-box;width:100%;height:100%;overflow:hidden;font:12px/1.35 Inter, Arial, sans-serif;
  color:var(--input-text, #ddd);user-select:none;--ek:#ffd65a;--ek-dim:var(--descrip-text, #999);
  --ek-line:var(--border-color, #4e4e4e);--ek-back:var(--comfy-input-bg, #222)}
.editkit *, .editkit *::before{box-sizing:border-box}
.ek-column{display:flex;flex-direction:column;gap:4px}
.ek-note{flex:none;min-height:16px;color:var(--ek-dim);overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.ek-cards{flex:1;min-height:0;overflow-y:auto;display:grid;gap:6px;align-content:start;
  grid-template-columns:repeat(var(--ek-columns, 3), minmax(0, 1fr));scrollbar-width:thin}
.ek-card{all:unset;box-sizing:border-box;cursor:pointer;padding:4px;border-radius:6px;background:var(--ek-back);
  border:2px solid transparent;display:flex;flex-direction:column;gap:3px}
.ek-card:hover{border-color:var(--ek-line)}
.ek-card:focus-visible{outline:2px solid #6fb3d2;outline-offset:-1px}
.ek-card.ek-on{border-color:var(--ek)}
.ek-frame{position:relative;line-height:0}
.ek-frame img, .ek-frame canvas{width:100%;display:block;border-radius:3px}
.ek-outline{position:absolute;inset:0;height:100%}
.ek-bar{height:5px;border-radius:3px;background:rgba(128,128,128,.25);overflow:hidden}
.ek-bar i{display:block;height:100%;background:#7fb77e}
.ek-on .ek-bar i{background:var(--ek)}
.ek-score{display:flex;justify-content:space-between;font-size:11px;color:var(--ek-dim)}
.ek-score b{color:var(--input-text, #ddd);font-weight:600}
.ek-row{display:flex;gap:4px;align-items:center;flex:none;min-width:0}
.ek-row > .ek-note{flex:1}
.ek-button{all:unset;box-sizing:border-box;cursor:pointer;padding:2px 8px;border-radius:4px;background:var(--ek-back);
  border:1px solid var(--ek-line);color:var(--input-text, #ddd);white-space:nowrap}
.ek-button:hover{border-color:var(--ek-dim)}
.ek-button:focus-visible, .ek-split:focus-visible + .ek-knob{outline:2px solid #6fb3d2}
.ek-button.ek-on{border-color:var(--ek);color:var(--ek)}
.ek-stage{position:relative;flex:1;min-height:0;overflow:hidden;border-radius:4px;background:var(--ek-back);
  cursor:ew-resize;touch-action:none}
.ek-stage img{position:absolute;inset:0;width:100%;height:100%;object-fit:contain;pointer-events:none}
.ek-split{position:absolute;inset:0;width:100%;height:100%;margin:0;opacity:0;pointer-events:none}
.ek-knob{position:absolute;top:0;bottom:0;width:2px;margin-left:-1px;background:#fff;pointer-events:none;
  box-shadow:0 0 3px #000}
.ek-knob::before{content:"";position:absolute;top:50%;left:-8px;width:18px;height:18px;margin-top:-9px;
  border-radius:50%;background:#fff;box-shadow:0 0 3px #000}
.ek-tag{position:absolute;top:4px;padding:0 5px;border-radius:3px;background:rgba(0,0,0,.6);color:#fff;font-size:11px;
  pointer-events:none}
.ek-scroll{flex:1;min-height:0;overflow:auto;scrollbar-width:thin}
.ek-words{display:flex;flex-wrap:wrap;gap:6px 5px;padding:3px}
.ek-group{display:flex;flex-direction:column;align-items:center;--kind:#7d8796}
.ek-replaced{--kind:#5b9dff} .ek-added{--kind:#56b77a} .ek-removed{--kind:#e0695f}
.ek-line{display:flex;gap:4px;min-height:24px;align-items:flex-start}
.ek-join{height:12px;width:100%;position:relative}
.ek-same .ek-join::before, .ek-replaced .ek-join::before{content:"";position:absolute;left:50%;top:1px;bottom:1px;
  border-left:2px solid var(--kind);margin-left:-1px}
.ek-fan-up{border-top:2px solid var(--kind)} .ek-fan-down{border-bottom:2px solid var(--kind)}
.ek-target{display:flex;flex-direction:column;align-items:stretch;min-width:34px}
.ek-chip{all:unset;box-sizing:border-box;cursor:pointer;height:22px;padding:1px 7px;border-radius:5px;text-align:center;
  background:color-mix(in srgb, var(--kind) 16%, var(--ek-back));border:1px solid var(--kind);white-space:nowrap;
  touch-action:none}
.ek-chip:hover{filter:brightness(1.2)}
.ek-chip:focus-visible, .ek-range s:focus-visible{outline:2px solid #fff}
.ek-chip em{font-style:normal;margin-left:4px}
.ek-chip b{margin-left:4px;color:var(--ek);font-weight:600}
.ek-chip.ek-blend{box-shadow:inset 0 0 0 1px var(--ek);border-color:var(--ek)}
.ek-chip.ek-keep{box-shadow:inset 0 0 0 1px #b9c0cc;border-color:#b9c0cc;border-style:dashed}
.ek-range{height:9px;margin:3px 4px 0;position:relative;background: linear-gradient(var(--ek-line), var(--ek-line)) center / 100% 2px
  no-repeat;opacity:.45}
.ek-range:hover, .ek-range.ek-on, .ek-range:focus-within{opacity:1}
.ek-range i{position:absolute;top:3px;height:3px;background:var(--kind);border-radius:2px}
.ek-range s{position:absolute;top:-3px;width:9px;height:9px;border-radius:50%;background:var(--kind);cursor:ew-resize;
  touch-action:none}
.ek-range .ek-first{left:-4px} .ek-range .ek-last{right:-4px}
.ek-stages{flex:1;min-height:0;display:flex;gap:5px;justify-content:center}
.ek-tile{flex:1 1 0;min-width:0;display:flex;flex-direction:column;align-items:center;gap:2px;min-height:0}
.ek-tile canvas{flex:1;min-height:0;max-width:100%;object-fit:contain;image-rendering:pixelated;border-radius:3px}
.ek-tile span{flex:none;font-size:11px;color:var(--ek-dim)}
.ek-track{flex:none;display:flex;position:relative;height:20px;margin:0 4px}
.ek-track:empty{display:none}
.ek-track span{flex:1 1 0;min-width:0;overflow:hidden;text-align:center;font-size:11px;line-height:20px;
  background:var(--ek-back);color:var(--input-text, #ddd)}
.ek-track span:nth-of-type(even){background:color-mix(in srgb, #7fb77e 30%, var(--ek-back))}
.ek-track i{position:absolute;top:-2px;bottom:-2px;width:9px;margin-left:-4px;border-radius:4px;background:#7fb77e;
  border:1px solid #222;cursor:ew-resize;touch-action:none}
.ek-track i:focus-visible{outline:2px solid #fff}
.ek-bright{color:var(--input-text, #ddd)}
.ek-chart{flex:1;min-height:0;width:100%;background:var(--ek-back);border-radius:4px}
.ek-chart polyline{stroke:#7fb77e;stroke-width:2}
.ek-button:disabled{opacity:.6;cursor:default}
`;
