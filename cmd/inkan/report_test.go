package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"image"
	"image/png"
	random "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/html"

	"inkan/audit"
	"inkan/internal/certext"
	"inkan/internal/jws"
	"inkan/internal/testca"
	"inkan/scope"
	"inkan/signer/client"
)

// reportScope lacks its controllers, which have keys of their own.
const reportScope = `{"allowed_actions":["order.cancel","order.new"],"allowed_instruments":[{"id":"isin:FR0000120271"},{"id":"isin:FR0000131104"}],"allowed_ord_types":["2"],"allowed_sides":["1","2"],"allowed_tif":["0"],"allowed_venues":["XAMS","XPAR"],"max_messages_per_window":[{"count":60,"window":{"rolling_s":3600}}],` +
	`"max_notional_per_window":[{"amount":"400000","currency":"EUR","window":{"rolling_s":3600}}],"max_order_notional":[{"amount":"25000","block":"soft","currency":"EUR"}],"max_qty_per_window":[{"instrument":"*","qty":"40000","window":{"day_cut":"22:00"}}]%s,"version":1}`

// history is a record of two days, with three certificates, and what a hostile
// agent and host can write into one.
type history struct {
	ca, log string // files
	id      audit.Identity
}

// hostile are texts that a page must show and must not obey.
var hostile = []string{"<script>document.title=1</script>", "<img/src=x/onerror=document.title=2>", "'-->]]></style></svg>{{.}}", "javascript:alert(1)", "&lt;b&gt;&#x3c;"}

func newHistory(t *testing.T) *history {
	t.Helper()
	dir := t.TempDir()
	h := &history{ca: filepath.Join(dir, "ca.pem"), log: filepath.Join(dir, "log.db")}
	ca := testca.New(t)
	writeFile(t, h.ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Certificate.Raw}))
	person, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key, err := scope.ControllerKey(&person.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	s, err := scope.Parse(fmt.Appendf(nil, reportScope, `,"os":{"execute":["/opt/bot"]},"controllers":[{"key":"`+key+`","may":["override","policy","rearm"],"name":"risk-desk"}]`))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now().Add(-40 * time.Hour).Truncate(time.Hour)
	log, err := audit.Open(t.Context(), h.log, audit.Options{Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var agent *testca.Agent
	renew := func(evidence string) {
		att, err := certext.AttestationExtension(certext.Attestation{Policy: "kernel-6.12", EvidenceSHA256: evidence, Time: now.UTC(), Protection: certext.ProtectionTPM, Mode: "local", EK: certext.EKCertified, Device: "host1"})
		must(err)
		agent = ca.Agent(t, "mm-07", s.Canonical(), func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = now.Add(-time.Minute), now.Add(20*time.Hour)
			c.ExtraExtensions[1] = att
		})
		must(log.AddCertificate(t.Context(), agent.Chain))
		h.id = audit.Identity{Issuer: "CN=Test CA", Agent: agent.ID, Certificate: sha256.Sum256(agent.Chain[0].Raw), Scope: s.Hash(), Evidence: evidence, AttestedAt: now, Lifetime: 30 * time.Second, Run: h.id.Run}
		doc := scope.StartDocument{Version: 1, Agent: agent.ID, Executable: scope.StartFile{Path: "/opt/bot/bot", SHA256: strings.Repeat("ab", 32)}, Files: []scope.StartFile{{Path: "/opt/bot/" + hostile[0], SHA256: strings.Repeat("cd", 32)}},
			Args: []string{"/opt/bot/bot", "--prompt", hostile[1], "\u202etxt.exe"}, Unit: "mm07.service", OS: s.OS().Digest(), Landlock: 7, Launcher: strings.Repeat("1", 64)}
		b, err := doc.Marshal()
		must(err)
		must(log.AddStart(t.Context(), b))
		h.id.Run, err = doc.Run()
		must(err)
	}
	seal := func() {
		x, err := log.Seal(t.Context(), h.id)
		must(err)
		text, err := x.Spend()
		must(err)
		sig, err := jws.Sign(agent.Key, text)
		must(err)
		_, err = log.KeepSeal(t.Context(), x, agent.Key.Public(), sig)
		must(err)
	}
	event := func(e *scope.Event, err error) scope.Counter {
		t.Helper()
		must(err)
		n, err := log.Event(t.Context(), e, h.id)
		must(err)
		return n
	}
	sources := random.New(random.NewPCG(1, 2))
	for n := range 400 {
		if n%150 == 0 {
			renew(strings.Repeat(fmt.Sprint(n/150), 64))
		}
		now = now.Add(time.Duration(60+sources.IntN(480)) * time.Second)
		venue, isin, side, qty := "XPAR", "FR0000120271", 1+sources.IntN(2), 50*(1+sources.IntN(9))
		if n%5 == 0 {
			venue, isin = "XAMS", "FR0000131104"
		}
		if n%17 == 3 {
			qty = 4000
		}
		if n == 100 {
			narrower, err := scope.Parse([]byte(strings.Replace(fmt.Sprintf(reportScope, ""), "400000", "300000", 1)))
			must(err)
			policy, err := scope.SignPolicy(person, h.id.Agent, 1, narrower, now.UTC().Truncate(time.Second), now.UTC().Truncate(time.Second).Add(48*time.Hour))
			must(err)
			event(scope.NewEvent(scope.EventPolicy, policy, s))
		}
		text := fmt.Sprintf(`{"id":%q,"aud":%q,"act":"order.new","ord":{"ClOrdID":"A-%d","SecurityID":%q,"SecurityIDSource":"4","Side":"%d","OrdType":"2","Price":"51.2","OrderQty":"%d","Currency":"EUR","TimeInForce":"0"}}`, client.NewID(), venue, n, isin, side, qty)
		switch {
		case n%40 == 7:
			text = fmt.Sprintf(`{"id":%q,"aud":"XPAR","act":"order.cancel","ord":{"OrigClOrdID":"A-%d","ClOrdID":"C-%d"}}`, client.NewID(), n-1, n)
		case n == 390:
			text = fmt.Sprintf(`{"id":%q,"aud":"XPAR","act":"order.cancel","ord":{"ClOrdID":"X","OrigClOrdID":%q,"OrderID":%q}}`, client.NewID(), hostile[0], hostile[1])
		case n > 390 && n < 396:
			text = strings.Replace(text, isin, strings.ReplaceAll(hostile[n-391], "\"", ""), 1)
			text = strings.Replace(text, `"SecurityIDSource":"4"`, `"SecurityIDSource":"8"`, 1)
		case n == 397:
			must(log.Refuse(t.Context(), nil, &scope.Refusal{Rule: scope.Rule(hostile[0]), Message: "\u202e" + hostile[1] + "\x00\x1b[2J" + strings.Repeat("W", 3000)}, h.id))
			continue
		}
		a, err := scope.ParseAction([]byte(text))
		must(err)
		env := scope.Env{Now: now, AttestedAt: h.id.AttestedAt, Run: h.id.Run, Agent: h.id.Agent}
		if n == 207 { // larger than the limit, with a person's leave
			override, err := scope.SignAuthorization(person, h.id.Agent, a, scope.RuleOrderNotional, "hedge "+hostile[0], now.UTC().Truncate(time.Second), now.UTC().Truncate(time.Second).Add(time.Hour))
			must(err)
			env.Authorizations = []string{override}
		}
		p, err := scope.Check(s, a, env)
		var r *audit.Receipt
		if err == nil {
			r, err = log.Record(t.Context(), p, h.id)
		} else if refusal, ok := err.(*scope.Refusal); ok {
			must(log.Refuse(t.Context(), a, refusal, h.id))
			continue
		}
		if _, ok := err.(*scope.Refusal); ok {
			continue // a limit over time refused, and recorded so
		}
		must(err)
		b, err := r.Spend()
		must(err)
		if n == 399 {
			break // and never signed
		}
		header, err := jws.NewHeader("ES256", agent.Chain, true)
		must(err)
		input := header.SigningInput(b)
		sig, err := jws.Sign(agent.Key, input)
		must(err)
		must(log.Complete(r, jws.Compact(input, sig)))
	}
	kill := scope.Kill{Scope: scope.KillAgent, Reason: "runs wild " + hostile[0] + "\u202e", By: "uid 0"}
	n := event(kill.Event(s))
	rearm, err := scope.SignRearm(person, h.id.Agent, n, "looked into", now.UTC().Truncate(time.Second), now.UTC().Truncate(time.Second).Add(time.Hour))
	must(err)
	event(scope.NewEvent(scope.EventRearm, rearm, s))
	seal()
	return h
}

// browser runs Chromium without a window, with a profile of its own, offline.
func browser(t *testing.T, args ...string) (stdout, stderr string) {
	t.Helper()
	path, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatal("chromium is missing: make tools installs it")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, append([]string{"--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
		"--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--user-data-dir=" + t.TempDir()}, args...)...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("chromium: %v: %s", err, errs.String())
	}
	return out.String(), errs.String()
}

// seen is what a rendered page shows.
type seen struct {
	elements map[string]int
	figures  map[string]string
	claims   map[string]struct {
		proven bool
		text   string
	}
	entries    []string
	rules      map[string]string // and their counts
	text       string
	attributes []string
}

func look(t *testing.T, dom string) *seen {
	t.Helper()
	root, err := html.Parse(strings.NewReader(dom))
	if err != nil {
		t.Fatal(err)
	}
	s := &seen{elements: make(map[string]int), figures: make(map[string]string), rules: make(map[string]string), claims: make(map[string]struct {
		proven bool
		text   string
	})}
	var text func(n *html.Node) string
	text = func(n *html.Node) string {
		if n.Type == html.TextNode {
			return n.Data
		}
		var b strings.Builder
		for c := range n.ChildNodes() {
			b.WriteString(text(c))
		}
		return b.String()
	}
	for n := range root.Descendants() {
		if n.Type != html.ElementNode {
			continue
		}
		s.elements[n.Data]++
		get := func(name string) (string, bool) {
			for _, a := range n.Attr {
				if a.Key == name {
					return a.Val, true
				}
			}
			return "", false
		}
		for _, a := range n.Attr {
			s.attributes = append(s.attributes, a.Key)
		}
		if f, ok := get("data-figure"); ok {
			s.figures[f] = strings.ReplaceAll(text(n), "\u00a0", "")
		}
		if c, ok := get("data-claim"); ok {
			proven, _ := get("data-proven")
			s.claims[c] = struct {
				proven bool
				text   string
			}{proven == "true", text(n)}
		}
		if e, ok := get("data-entry"); ok {
			s.entries = append(s.entries, e)
		}
		if r, ok := get("data-rule"); ok {
			for c := range n.Descendants() {
				if c.Data == "td" {
					s.rules[r] = strings.ReplaceAll(text(c), "\u00a0", "")
					break
				}
			}
		}
		if n.Data == "body" {
			s.text = text(n)
		}
	}
	return s
}

// TestReport opens the page in a browser: what it shows is what verification
// says, and nothing in the record becomes more than text.
func TestReport(t *testing.T) {
	h := newHistory(t)
	page := filepath.Join(t.TempDir(), "report.html")
	code, verified, errs := call("", "audit", "verify", "--log", h.log, "--ca", h.ca, "--json")
	if code != 0 {
		t.Fatalf("exit code %d: %s", code, errs)
	}
	code, out, errs := call("", "audit", "report", "--log", h.log, "--ca", h.ca, "--out", page, "--json")
	if code != 0 || out != verified {
		t.Fatalf("exit code %d: %s: it says %s, verify says %s", code, errs, out, verified)
	}
	dom, console := browser(t, "--dump-dom", "file://"+page)
	for _, bad := range []string{"Content Security Policy", "CONSOLE", "Uncaught"} {
		if strings.Contains(console, bad) {
			t.Errorf("the browser says %s", console)
		}
	}
	s := look(t, dom)
	compare(t, s, verified)

	for _, never := range []string{"script", "img", "iframe", "object", "embed", "form", "input", "base", "b", "foreignObject", "link"} {
		if s.elements[never] > 0 {
			t.Errorf("the page has %d elements %s", s.elements[never], never)
		}
	}
	for _, a := range s.attributes {
		if a == "src" || a == "style" || a == "srcset" || strings.HasPrefix(a, "on") {
			t.Errorf("the page has an attribute %s", a)
		}
	}
	for _, text := range append(hostile[:4:4], "\u27e8U+202E\u27e9", "\u27e8U+001B\u27e9[2J") {
		if !strings.Contains(s.text, text) {
			t.Errorf("the page does not show %q", text)
		}
	}
	if strings.ContainsAny(dom, "\u202e\x00\x1b") || strings.Contains(s.text, strings.Repeat("W", 300)) {
		t.Error("a text from the record was neither made visible nor bounded")
	}
	for kind, text := range map[string]string{"control.kill": "by: uid 0; reason: runs wild " + hostile[0], "control.policy": "signed by risk-desk; agent: ", "control.rearm": "reason: looked into", "authorization": "reason: hedge " + hostile[0]} {
		if !strings.Contains(s.text, text) || !strings.Contains(dom, `<li data-event="`+kind+`">`) {
			t.Errorf("the page does not show %s as %q", kind, text)
		}
	}
	if !strings.Contains(s.text, "are worth at most 300000 EUR together") {
		t.Error("the page does not say what the policy allows")
	}
	if n := s.elements["title"]; n < 100 || !strings.Contains(dom, "<title>Record of mm-07</title>") {
		t.Errorf("%d titles", n)
	}
	if keep := os.Getenv("INKAN_REPORT"); keep != "" { // to look at it
		b, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		writeFile(t, keep, b)
	}

	// It is drawn: not one colour, at either width.
	for _, width := range []int{1200, 480} {
		shot := filepath.Join(t.TempDir(), "page.png")
		browser(t, "--hide-scrollbars", fmt.Sprintf("--window-size=%d,4000", width), "--screenshot="+shot, "file://"+page)
		f, err := os.Open(shot)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		m, err := png.Decode(f)
		if err != nil {
			t.Fatal(err)
		}
		if n := colours(m); n < 50 || m.Bounds().Dx() != width {
			t.Errorf("at width %d the page has %d colours in %v", width, n, m.Bounds())
		}
	}
}

func colours(m image.Image) int {
	found := make(map[[4]uint32]bool)
	for y := m.Bounds().Min.Y; y < m.Bounds().Max.Y; y += 3 {
		for x := m.Bounds().Min.X; x < m.Bounds().Max.X; x += 3 {
			r, g, b, a := m.At(x, y).RGBA()
			found[[4]uint32{r, g, b, a}] = true
		}
	}
	return len(found)
}

// compare holds what a page shows against what verify prints.
func compare(t *testing.T, s *seen, verified string) {
	t.Helper()
	var r audit.Report
	if err := json.Unmarshal([]byte(verified), &r); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"agent": r.Agent, "entries": fmt.Sprint(r.Entries), "permits": fmt.Sprint(r.Permits), "signed": fmt.Sprint(r.Signed), "denials": fmt.Sprint(r.Denials), "certificates": fmt.Sprint(r.Certificates), "events": fmt.Sprint(r.Events),
		"root": r.Root, "first": r.First.Format(scope.TimeFormat), "last": r.Last.Format(scope.TimeFormat),
	} {
		if s.figures[name] != want {
			t.Errorf("the page shows %s as %q, verify says %q", name, s.figures[name], want)
		}
	}
	if len(s.claims) != len(r.Claims) {
		t.Errorf("the page has %d claims, verify has %d", len(s.claims), len(r.Claims))
	}
	for _, c := range r.Claims {
		got, ok := s.claims[c.Name]
		if !ok || got.proven != c.Proven || !strings.HasSuffix(got.text, c.Text) {
			t.Errorf("the claim %s (%v, %q) is shown as %v %q", c.Name, c.Proven, c.Text, got.proven, got.text)
		}
	}
	denied := 0
	for rule, count := range s.rules {
		n := 0
		if _, err := fmt.Sscan(count, &n); err != nil {
			t.Errorf("refusals by %s are shown as %q", rule, count)
		}
		denied += n
	}
	if uint64(denied) != r.Denials {
		t.Errorf("refusals by rule add up to %d, verify says %d", denied, r.Denials)
	}
}

// TestReportOfExport: a part of a record, from standard input, with the digest of what was read.
func TestReportOfExport(t *testing.T) {
	h := newHistory(t)
	from := time.Now().Add(-30 * time.Hour).UTC().Format(time.RFC3339)
	code, export, errs := call("", "audit", "export", "--log", h.log, "--from", from)
	if code != 0 {
		t.Fatal(errs)
	}
	_, verified, _ := call(export, "audit", "verify", "--export", "-", "--ca", h.ca, "--json")
	code, page, errs := call(export, "audit", "report", "--export", "-", "--ca", h.ca)
	if code != 0 {
		t.Fatal(errs)
	}
	s := look(t, page)
	compare(t, s, verified)
	if want := fmt.Sprintf("%x", sha256.Sum256([]byte(export))); s.figures["sha256"] != want || !strings.Contains(s.figures["filter"], "entries from ") {
		t.Errorf("the page is of %q, %q", s.figures["sha256"], s.figures["filter"])
	}
	// Two parts in one file have a chapter each.
	code, page, errs = call(export+export, "audit", "report", "--export", "-", "--ca", h.ca)
	if s := look(t, page); code != 0 || s.elements["article"] != 2 {
		t.Errorf("exit code %d: %s: %d articles", code, errs, s.elements["article"])
	}

	// What does not verify is said, and nothing else.
	bad := strings.Replace(export, `"OrderQty":"`, `"OrderQty":"1`, 1)
	code, page, errs = call(bad, "audit", "report", "--export", "-", "--ca", h.ca)
	s = look(t, page)
	if code != exitUnproven || s.figures["rule"] != "fields" || s.figures["entries"] != "" || s.elements["table"] != 0 || !strings.Contains(errs, "does not verify") {
		t.Errorf("exit code %d: %s: %v", code, errs, s.figures)
	}
	file := filepath.Join(t.TempDir(), "page.html")
	code, out, _ := call(bad, "audit", "report", "--export", "-", "--ca", h.ca, "--out", file, "--json")
	if _, err := os.Stat(file); err != nil || code != exitUnproven || !strings.Contains(out, `"rule":"fields"`) {
		t.Errorf("exit code %d: %s, %v", code, out, err)
	}
	for _, args := range [][]string{{"--log", h.log}, {"--log", h.log, "--export", "-", "--ca", h.ca}, {"--log", h.log, "--ca", h.ca, "--json"}} {
		if code, _, _ := call("", append([]string{"audit", "report"}, args...)...); code != exitUsage {
			t.Errorf("%v: exit code %d", args, code)
		}
	}
}
