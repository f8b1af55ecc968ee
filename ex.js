const fs=require('fs');const h=fs.readFileSync('/work/wt-explor/examples/course/explorable.html','utf8');
for(const n of ['arithmetic','chains']) (0,eval)(h.match(new RegExp(`<script id="${n}">([\\s\\S]*?)</script>`))[1].replace(/^const /gm,'var '));
const base={correction:'on',lookahead:'none',maximum:'none',division:'normalize',epsilon:'eps',...DEFAULTS};
for(const name of ['rosenbrock','beale','quadratic']) for(const a of [.02,.05,.1,.2,.3,.5]) {
 const S=SURFACES[name]; const p=descend(stages_of({...base,learning_rate:a}),S.gradient,S.start,1000);
 console.log(name,a,[100,200,300,400,500,1000].map(t=>t+':'+S.loss(p[t].point).toExponential(1)+' d'+Math.hypot(p[t].point[0]-S.minimum[0],p[t].point[1]-S.minimum[1]).toFixed(3)).join('  '));
}
