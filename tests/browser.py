"A page in headless Chromium, by the DevTools protocol over two pipes: real keys, and whatever the console says."
import json, os, select, shutil, subprocess, time

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
FLAGS = '--headless=new --no-sandbox --disable-gpu --mute-audio --no-first-run --remote-debugging-pipe'.split()
CODES = {' ': ('Space', 32), 'Escape': ('Escape', 27), 'Enter': ('Enter', 13)}

class Page:
    "One page; `complaints` are errors, warnings and requests other than for the file itself"
    def __init__(self, path, folder, scheme='light', width=1200):
        (read, self.to), (self.source, write) = os.pipe(), os.pipe()
        command = ' '.join([CHROMIUM, *FLAGS, f'--user-data-dir={folder}', f'3<&{read}', f'4>&{write}'])
        self.process = subprocess.Popen(['bash', '-c', f'exec {command}'], pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for end in (read, write): os.close(end)
        self.number, self.session, self.rest, self.complaints = 0, None, b'', []
        target = self.ask('Target.createTarget', url='about:blank')['targetId']
        self.session = self.ask('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Network', 'Log'): self.ask(f'{domain}.enable')
        self.ask('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value=scheme)])
        self.ask('Emulation.setDeviceMetricsOverride', width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.ask('Page.navigate', url=path.as_uri())
        self.until('document.readyState == "complete"')

    def __enter__(self): return self
    def __exit__(self, *_): self.process.kill(); self.process.wait(); os.close(self.to); os.close(self.source)

    def message(self, seconds=60):
        "The next message of the browser"
        while b'\0' not in self.rest:
            assert select.select([self.source], [], [], seconds)[0], 'Chromium does not answer'
            piece = os.read(self.source, 2**16)
            assert piece, 'Chromium has ended'
            self.rest += piece
        first, _, self.rest = self.rest.partition(b'\0')
        return json.loads(first)

    def ask(self, method, **parameters):
        "A command's answer; what happens meanwhile is heard"
        self.number += 1
        os.write(self.to, json.dumps(dict(id=self.number, method=method, params=parameters) | (dict(sessionId=self.session) if self.session else {})).encode() + b'\0')
        while (m := self.message()).get('id') != self.number: self.hear(m.get('method'), m.get('params', {}))
        assert 'error' not in m, m
        return m['result']

    def hear(self, method, p):
        if method == 'Runtime.exceptionThrown': self.complaints.append(p['exceptionDetails'])
        if method == 'Runtime.consoleAPICalled' and p['type'] in ('error', 'warning', 'assert'): self.complaints.append(p['args'])
        if method == 'Log.entryAdded' and p['entry']['level'] in ('error', 'warning'): self.complaints.append(p['entry']['text'])
        if method == 'Network.requestWillBeSent' and not p['request']['url'].startswith(('file:', 'data:', 'about:')): self.complaints.append(p['request']['url'])

    def __call__(self, expression):
        "The value of a JavaScript expression"
        answer = self.ask('Runtime.evaluate', expression=expression, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in answer, answer
        return answer['result'].get('value')

    def until(self, expression, seconds=20):
        end = time.monotonic() + seconds
        while not self(expression):
            assert time.monotonic() < end, f'never came: {expression}'
            time.sleep(0.05)

    def press(self, *keys):
        for key in keys:
            code, number = CODES.get(key, (f'Key{key.upper()}', ord(key[0].upper())))
            text = {} if key == 'Escape' else dict(text='\r' if key == 'Enter' else key)
            self.ask('Input.dispatchKeyEvent', type='keyDown', key=key, code=code, windowsVirtualKeyCode=number, **text)
            self.ask('Input.dispatchKeyEvent', type='keyUp', key=key, code=code, windowsVirtualKeyCode=number)

    def click(self, selector):
        "A mouse click in the middle of an element"
        box = self(f'(e => {{ e.scrollIntoView({{block: "center"}}); const b = e.getBoundingClientRect(); return [b.x + b.width/2, b.y + b.height/2] }})(document.querySelector({json.dumps(selector)}))')
        for kind in ('mousePressed', 'mouseReleased'): self.ask('Input.dispatchMouseEvent', type=kind, x=box[0], y=box[1], button='left', clickCount=1)
