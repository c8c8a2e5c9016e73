package binding_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"inkan/internal/jws"
	"inkan/internal/testca"
	"inkan/scope"
	"inkan/verify"
	"inkan/verify/binding"
	"inkan/verify/message"
)

type vector struct {
	Name, Why, Message, Covered, Frame, SHA256 string
	SameAs                                     string `json:"same_as"`
	DiffersFrom                                string `json:"differs_from"`
	Refused                                    *string
}

func vectors(t testing.TB, name string) []vector {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	var out []vector
	if err := json.Unmarshal(b, &out); err != nil || len(out) == 0 {
		t.Fatal(err, len(out))
	}
	return out
}

func wire(s string) []byte { return []byte(strings.ReplaceAll(s, "|", "\x01")) }

func TestFIXVectors(t *testing.T) {
	digests := make(map[string][32]byte)
	for _, v := range vectors(t, "fix.json") {
		m, err := binding.ParseFIX(wire(v.Message))
		if v.Refused != nil {
			if err == nil || !strings.Contains(err.Error(), *v.Refused) {
				t.Errorf("%s: %v, want %q", v.Name, err, *v.Refused)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", v.Name, err)
			continue
		}
		sum := m.Digest()
		digests[v.Name] = sum
		if !bytes.Equal(m.Covered(), wire(v.Covered)) || hex.EncodeToString(sum[:]) != v.SHA256 {
			t.Errorf("%s: covered is %q, digest %x", v.Name, m.Covered(), sum)
		}
		if v.SameAs != "" && digests[v.SameAs] != sum || v.DiffersFrom != "" && digests[v.DiffersFrom] == sum {
			t.Errorf("%s: digest %x, like %q, unlike %q", v.Name, sum, v.SameAs, v.DiffersFrom)
		}
	}
}

func TestFrameVectors(t *testing.T) {
	for _, v := range vectors(t, "ws.json") {
		f, err := binding.ParseFrame([]byte(v.Frame))
		if v.Refused != nil {
			if err == nil || !strings.Contains(err.Error(), *v.Refused) {
				t.Errorf("%s: %v, want %q", v.Name, err, *v.Refused)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", v.Name, err)
			continue
		}
		if sum := binding.TextDigest([]byte(f.Message)); f.Message != v.Message || hex.EncodeToString(sum[:]) != v.SHA256 {
			t.Errorf("%s: %q, %x", v.Name, f.Message, sum)
		}
	}
	for name, f := range map[string]binding.Frame{"no action": {Message: "x"}, "no message": {Action: "x"}, "a long one": {"x", strings.Repeat("x", binding.MaxText+1)}, "not UTF-8": {"x", "\xff"}} {
		if _, err := binding.NewFrame([]byte(f.Message), f.Action); err == nil {
			t.Errorf("a frame with %s", name)
		}
	}
}

// TestOtherLanguage: the vectors hold without this package.
func TestOtherLanguage(t *testing.T) {
	out, err := exec.Command("/usr/bin/python3", "-I", "testdata/check.py").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s (make tools installs /usr/bin/python3)", err, out)
	}
	if n := strings.TrimSpace(string(out)); n == "" || n == "0" {
		t.Errorf("it checked %s vectors", n)
	}
}

const scopeJSON = `{"allowed_accounts":["ACC-1"],"allowed_actions":["order.cancel","order.mass_cancel","order.new","order.replace","quote.new"],"allowed_instruments":[{"id":"isin:FR0000120271"}],"allowed_ord_types":["2"],"allowed_sides":["1","2"],"allowed_tif":["0","6"],"allowed_venues":["XPAR"],"max_order_notional":[{"amount":"25000","currency":"EUR"}],"version":1}`

// venue is a receiver, and an agent whose signer signs for it.
type venue struct {
	agent    *testca.Agent
	roots    *x509.CertPool
	scope    *scope.Scope
	receiver *verify.Receiver
	now      time.Time
	next     uint64
}

func newVenue(t testing.TB) *venue {
	t.Helper()
	ca := testca.New(t)
	v := &venue{roots: ca.Roots, agent: ca.Agent(t, "a", []byte(scopeJSON), nil), now: time.Now()}
	var err error
	if v.scope, err = scope.ParseCanonical([]byte(scopeJSON)); err != nil {
		t.Fatal(err)
	}
	v.receiver, err = verify.NewReceiver(verify.Config{Audiences: []string{"XPAR"}, Roots: ca.Roots, Revocation: verify.NoRevocation{}, Replay: verify.NewMemoryStore(1000, v.now.Add(-time.Hour)), Now: func() time.Time { return v.now }})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

const newOrder = `"act":"order.new","ord":{"ClOrdID":"A-991","Account":"ACC-1","SecurityID":"FR0000120271","SecurityIDSource":"4","Side":"1","OrdType":"2","Price":"61.24","OrderQty":"400","Currency":"EUR","TimeInForce":"0"}`

// sign signs an action for a message.
func (v *venue) sign(t testing.TB, action, format string, digest [32]byte) string {
	t.Helper()
	v.next++
	id := base64.RawURLEncoding.EncodeToString(binary.BigEndian.AppendUint64(make([]byte, 8), v.next))
	a, err := scope.ParseAction(fmt.Appendf(nil, `{"id":%q,"aud":"XPAR",%s,"native":{"fmt":%q,"sha-256":"%x"}}`, id, action, format, digest))
	if err != nil {
		t.Fatal(err)
	}
	now := v.now.UTC().Truncate(time.Microsecond)
	p, err := scope.Check(v.scope, a, scope.Env{Now: now, AttestedAt: now})
	if err != nil {
		t.Fatal(err)
	}
	st := &scope.Statement{Version: 1, Issuer: "CN=Test CA", Agent: v.agent.ID, Audience: "XPAR", ID: a.ID, Counter: scope.Counter(v.next), Time: scope.Timestamp{Time: now}, Expires: now.Add(30 * time.Second).Unix(), Kind: a.Kind, Order: a.Order, Party: a.Party, Native: a.Native,
		Decision: scope.Decision{Decision: scope.DecisionPermit, Certificate: sha256.Sum256(v.agent.Chain[0].Raw), Scope: v.scope.Hash()}, Attestation: scope.Attestation{Evidence: "00", Time: scope.Timestamp{Time: now.Truncate(time.Second)}}}
	if amount, currency, ok := p.Notional(); ok {
		st.Decision.Notional = &scope.Amount{Amount: amount, Currency: currency}
	}
	if v.next > 1 {
		st.Previous = scope.Digest{1}
	}
	b, err := st.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	h, err := jws.NewHeader("ES256", v.agent.Chain, true)
	if err != nil {
		t.Fatal(err)
	}
	input := h.SigningInput(b)
	sig, err := jws.Sign(v.agent.Key, input)
	if err != nil {
		t.Fatal(err)
	}
	return jws.Compact(input, sig)
}

// fix builds a FIX message from its fields after BodyLength.
func fix(fields ...string) []byte {
	body := strings.Join(fields, "\x01") + "\x01"
	m := fmt.Sprintf("8=FIX.4.4\x019=%d\x01%s", len(body), body)
	sum := byte(0)
	for _, c := range []byte(m) {
		sum += c
	}
	return fmt.Appendf(nil, "%s10=%03d\x01", m, sum)
}

var (
	session = []string{"35=D", "49=AGENT", "56=XPAR", "34=12", "52=20260727-09:30:00"}
	order   = []string{"11=A-991", "1=ACC-1", "48=FR0000120271", "22=4", "55=[N/A]", "54=1", "60=20260727-09:30:00", "38=400", "40=2", "44=61.24", "15=EUR", "59=0"}
)

// signed returns a FIX message with the action that was signed for it.
func (v *venue) signed(t testing.TB, action string, fields ...string) []byte {
	t.Helper()
	plain := fix(fields...)
	m, err := binding.ParseFIX(plain)
	if err != nil {
		t.Fatal(err)
	}
	out, err := binding.AttachFIX(plain, v.sign(t, action, scope.NativeFIXBody, m.Digest()))
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// rewrite does what an engine does to a message on its way.
func rewrite(message []byte, change func(fields []string) []string) []byte {
	fields := strings.Split(strings.TrimSuffix(string(message), "\x01"), "\x01")
	return fix(change(slices.Clone(fields[2 : len(fields)-1]))...)
}

func reason(err error) verify.Reason {
	if r, ok := errors.AsType[*verify.Refusal](err); ok {
		return r.Reason
	}
	return verify.Reason(fmt.Sprint(err))
}

func TestFIX(t *testing.T) {
	v := newVenue(t)
	ctx := context.Background()
	accept := func(m []byte) (*binding.Accepted, error) { return binding.FIX(ctx, v.receiver, netip.Addr{}, m, nil) }
	message := v.signed(t, newOrder, append(session, order...)...)
	changed := func(from, to string) []byte {
		return rewrite(message, func(f []string) []string { f[slices.Index(f, from)] = to; return f })
	}
	for name, m := range map[string][]byte{
		"quantity": changed("38=400", "38=500"), "side": changed("54=1", "54=2"), "type": changed("35=D", "35=G"), "spelling": changed("44=61.24", "44=61.240"), "account": changed("1=ACC-1", "1=ACC-2"),
		"a field more": rewrite(message, func(f []string) []string { return append(f, "18=G") }), "a field less": rewrite(message, func(f []string) []string { return append(f[:5:5], f[6:]...) }),
	} {
		if _, err := accept(m); reason(err) != verify.ReasonBody {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := accept(append(message, "58=x\x01"...)); reason(err) != verify.ReasonForm {
		t.Errorf("not a message: %v", err)
	}
	if _, err := accept(fix(append(session, order...)...)); reason(err) != verify.ReasonForm {
		t.Errorf("no action: %v", err)
	}
	// What the engine rewrites does not matter.
	sent := rewrite(message, func(f []string) []string {
		return append([]string{"35=D", "34=977", "52=20260727-09:30:04.5", "56=GATEWAY", "49=HUB"}, f[5:]...)
	})
	got, err := accept(sent)
	if err != nil || got.Resend || got.Action.Order.ClOrdID != "A-991" {
		t.Fatalf("%+v, %v", got, err)
	}
	// Sent again: with the session's flag it is a resend, without it a replay.
	again := rewrite(sent, func(f []string) []string {
		return append([]string{"35=D", "43=Y", "122=20260727-09:30:04.5"}, f[1:]...)
	})
	if got, err := accept(again); err != nil || !got.Resend || got.Verified != nil {
		t.Errorf("a resend: %+v, %v", got, err)
	}
	if _, err := accept(sent); reason(err) != verify.ReasonReplay {
		t.Errorf("a replay: %v", err)
	}
	if _, err := accept(rewrite(sent, func(f []string) []string { return append([]string{"35=D", "43=N"}, f[1:]...) })); reason(err) != verify.ReasonReplay {
		t.Errorf("a replay that says so: %v", err)
	}
	if _, err := accept(rewrite(again, func(f []string) []string { f[slices.Index(f, "38=400")] = "38=500"; return f })); reason(err) != verify.ReasonBody {
		t.Errorf("a resend with another quantity: %v", err)
	}
	// A message that says what the action does not uses the action up no more than any other refusal.
	lying := v.signed(t, newOrder, append(session, strings.Split(strings.Replace(strings.Join(order, "|"), "38=400", "38=4000", 1), "|")...)...)
	for range 2 {
		if _, err := accept(lying); reason(err) != verify.ReasonMismatch {
			t.Errorf("another order than was signed for: %v", err)
		}
	}
	// The first that arrives of a message that may have been sent before is new.
	lost := v.signed(t, newOrder, append([]string{"35=D", "43=Y", "122=20260727-09:30:00"}, append(session[1:], order...)...)...)
	if got, err := accept(lost); err != nil || got.Resend {
		t.Errorf("the first one to arrive: %+v, %v", got, err)
	}
	v.now = v.now.Add(time.Minute)
	if _, err := accept(again); reason(err) != verify.ReasonStale {
		t.Errorf("a resend after the action's end: %v", err)
	}
}

func TestFIXAgrees(t *testing.T) {
	party := `,"pty":{"client":"C-1","dec":{"algo":"LLM-MM-07"},"exe":{"person":"P-1"}}`
	gtd := strings.Replace(newOrder, `"TimeInForce":"0"`, `"TimeInForce":"6","ExpireTime":"2026-07-27T16:00:00Z"`, 1)
	cancel := `"act":"order.cancel","ord":{"ClOrdID":"C-1","OrigClOrdID":"A-991","SecurityID":"FR0000120271","SecurityIDSource":"4","Side":"1"}`
	quote := `"act":"quote.new","ord":{"ClOrdID":"Q-1","SecurityID":"FR0000120271","SecurityIDSource":"4","BidPx":"61","BidSize":"10","OfferPx":"62","OfferSize":"20","Currency":"EUR","TimeInForce":"0"}`
	with := func(from, to string, more ...string) []string {
		out := strings.Split(strings.Replace(strings.Join(order, "|"), from, to, 1), "|")
		return append(slices.DeleteFunc(out, func(s string) bool { return s == "" }), more...)
	}
	for _, c := range []struct {
		name, action, kind string
		fields             []string
		profile            *binding.Profile
		want               string // empty: they agree
	}{
		{"an order", newOrder, "D", order, nil, ""},
		{"a replacement by its kind", newOrder, "G", order, nil, "MsgType"},
		{"an unknown kind", newOrder, "AE", order, nil, "MsgType"},
		{"quantity", newOrder, "D", with("38=400", "38=4000"), nil, "tag 38"},
		{"another spelling", newOrder, "D", with("44=61.24", "44=61.240"), nil, "tag 44"},
		{"account", newOrder, "D", with("1=ACC-1", "1=ACC-2"), nil, "tag 1 "},
		{"twice", newOrder, "D", with("38=400", "38=400", "38=4000"), nil, "tag 38 stands twice"},
		{"left out", newOrder, "D", with("15=EUR", ""), nil, "the action has tag 15"},
		{"implied", newOrder, "D", with("15=EUR", ""), &binding.Profile{Implied: map[int]string{15: "EUR"}}, ""},
		{"implied, any value", newOrder, "D", with("15=EUR", ""), &binding.Profile{Implied: map[int]string{15: "*"}}, ""},
		{"implied otherwise", newOrder, "D", with("15=EUR", ""), &binding.Profile{Implied: map[int]string{15: "USD"}}, "tag 15"},
		{"said, implied otherwise", newOrder, "D", order, &binding.Profile{Implied: map[int]string{15: "USD"}}, ""},
		{"unknown", newOrder, "D", with("", "", "18=G"), nil, "tag 18"},
		{"unknown and free", newOrder, "D", with("", "", "58=hello"), &binding.Profile{Free: []int{58}}, ""},
		{"more than the action", newOrder, "D", with("", "", "99=60"), nil, "tag 99"},
		{"symbol", newOrder, "D", with("55=[N/A]", "55=FR0000120271"), nil, ""},
		{"another symbol", newOrder, "D", with("55=[N/A]", "55=OTHER"), nil, "tag 55"},
		{"venue", newOrder, "D", with("", "", "207=XPAR", "100=XPAR"), nil, ""},
		{"another venue", newOrder, "D", with("", "", "100=XLON"), nil, "tag 100"},
		{"by hand", newOrder, "D", with("", "", "21=3"), nil, "tag 21"},
		{"on behalf", newOrder, "D", append([]string{"115=X"}, order...), nil, "tag 115"},
		{"good till date", gtd, "D", with("59=0", "59=6", "126=20260727-16:00:00"), nil, ""},
		{"another date", gtd, "D", with("59=0", "59=6", "126=20260728-16:00:00"), nil, "tag 126"},
		{"parties", newOrder + party, "D", with("", "", "453=3", "448=C-1", "447=D", "452=3", "448=LLM-MM-07", "447=D", "452=122", "2376=22", "448=P-1", "452=12", "2376=24"), nil, ""},
		{"another client", newOrder + party, "D", with("", "", "453=1", "448=C-2", "452=3"), nil, "role 3"},
		{"a person for an algorithm", newOrder + party, "D", with("", "", "453=1", "448=LLM-MM-07", "452=122", "2376=24"), nil, "qualifier"},
		{"a client that the action lacks", newOrder, "D", with("", "", "453=1", "448=C-1", "452=3"), nil, "role 3"},
		{"another role", newOrder + party, "D", with("", "", "453=1", "448=X", "452=1"), nil, "role"},
		{"fewer parties", newOrder + party, "D", with("", "", "453=2", "448=C-1", "452=3"), nil, "2 parties"},
		{"more parties", newOrder + party, "D", with("", "", "453=1", "448=C-1", "452=3", "448=P-1", "452=12"), nil, "tag 448"},
		{"a party twice", newOrder + party, "D", with("", "", "453=1", "448=C-1", "452=3", "452=12"), nil, "twice in a party"},
		{"no number of parties", newOrder + party, "D", with("", "", "453=0"), nil, "1 to 16"},
		{"a cancel", cancel, "F", []string{"11=C-1", "41=A-991", "48=FR0000120271", "22=4", "54=1", "60=20260727-09:30:00"}, nil, ""},
		{"another order's cancel", cancel, "F", []string{"11=C-1", "41=A-992", "48=FR0000120271", "22=4", "54=1"}, nil, "tag 41"},
		{"a mass cancel", `"act":"order.mass_cancel","ord":{"ClOrdID":"M-1"}`, "q", []string{"11=M-1", "530=7"}, nil, ""},
		{"of an instrument", `"act":"order.mass_cancel","ord":{"ClOrdID":"M-1","SecurityID":"FR0000120271","SecurityIDSource":"4"}`, "q", []string{"11=M-1", "530=1", "48=FR0000120271", "22=4"}, nil, ""},
		{"of more", `"act":"order.mass_cancel","ord":{"ClOrdID":"M-1","SecurityID":"FR0000120271","SecurityIDSource":"4"}`, "q", []string{"11=M-1", "530=7", "48=FR0000120271", "22=4"}, nil, "tag 530"},
		{"a quote", quote, "S", []string{"117=Q-1", "48=FR0000120271", "22=4", "132=61", "134=10", "133=62", "135=20", "15=EUR", "59=0"}, nil, ""},
		{"a quote's other side", quote, "S", []string{"117=Q-1", "48=FR0000120271", "22=4", "132=61", "134=10", "133=61", "135=20", "15=EUR", "59=0"}, nil, "tag 133"},
	} {
		m, err := binding.ParseFIX(fix(append([]string{"35=" + c.kind, "49=A", "56=B", "34=1", "52=20260727-09:30:00"}, c.fields...)...))
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		a, err := scope.ParseAction([]byte(`{"id":"AAECAwQFBgcICQoLDA0ODw","aud":"XPAR",` + c.action + `}`))
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		err = m.Agrees(a, c.profile)
		if (c.want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}

func TestText(t *testing.T) {
	v := newVenue(t)
	route := &message.Route{Kinds: []scope.Kind{scope.OrderNew}, Body: map[string]message.Member{"op": {Const: "order"}, "id": {Field: "ord.ClOrdID"}, "qty": {Field: "ord.OrderQty"}, "px": {Field: "ord.Price"}},
		Implied: map[string]string{"ord.Account": "*", "ord.SecurityID": "*", "ord.SecurityIDSource": "4", "ord.Side": "1", "ord.OrdType": "2", "ord.Currency": "EUR", "ord.TimeInForce": "0"}}
	accept := func(frame []byte) (*binding.Accepted, error) {
		return binding.Text(context.Background(), v.receiver, netip.Addr{}, frame, route.Agrees)
	}
	message := []byte(`{"op":"order", "id":"A-991","qty":"400","px":61.24}`)
	action := v.sign(t, newOrder, scope.NativeWSText, binding.TextDigest(message))
	frame, err := binding.NewFrame(message, action)
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{`{"op":"order","id":"A-991","qty":"400","px":61.24}`, `{"op":"order", "id":"A-991","qty":"401","px":61.24}`} {
		f, err := binding.NewFrame([]byte(bad), action)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := accept(f); reason(err) != verify.ReasonBody {
			t.Errorf("%s: %v", bad, err)
		}
	}
	if _, err := accept(message); reason(err) != verify.ReasonForm {
		t.Errorf("a message without an action: %v", err)
	}
	if got, err := accept(frame); err != nil || !bytes.Equal(got.Message, message) || got.Agent != v.agent.ID {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := accept(frame); reason(err) != verify.ReasonReplay {
		t.Errorf("again: %v", err)
	}
	large := []byte(`{"op":"order","id":"A-991","qty":"4000","px":61.24}`)
	frame, err = binding.NewFrame(large, v.sign(t, newOrder, scope.NativeWSText, binding.TextDigest(large)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := accept(frame); reason(err) != verify.ReasonMismatch {
		t.Errorf("another order than was signed for: %v", err)
	}
	// An action for one binding is of no use in another.
	other, err := binding.NewFrame(message, v.sign(t, newOrder, scope.NativeHTTPBody, binding.TextDigest(message)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := accept(other); reason(err) != verify.ReasonBody {
		t.Errorf("an action for a request's body: %v", err)
	}
}

func TestAttach(t *testing.T) {
	plain := fix(append(session, order...)...)
	once, err := binding.AttachFIX(plain, "a.b.c")
	if err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]func() error{
		"twice":     func() error { _, err := binding.AttachFIX(once, "a.b.c"); return err },
		"no action": func() error { _, err := binding.AttachFIX(plain, ""); return err },
		"an action with a field in it": func() error {
			_, err := binding.AttachFIX(plain, "a\x0138=9")
			return err
		},
		"too much":    func() error { _, err := binding.AttachFIX(plain, strings.Repeat("a", binding.MaxFIX)); return err },
		"no message":  func() error { _, err := binding.AttachFIX([]byte("x"), "a.b.c"); return err },
		"a large one": func() error { _, err := binding.ParseFIX(make([]byte, binding.MaxFIX+1)); return err },
		"many fields": func() error {
			_, err := binding.ParseFIX(fix(append(session, slices.Repeat([]string{"58=x"}, 2000)...)...))
			return err
		},
		"a large text": func() error { _, err := binding.ParseFrame(bytes.Repeat([]byte(" "), binding.MaxFrame+1)); return err },
	} {
		if f() == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// FuzzFIX: what parses has one reading, and attaching an action changes nothing that is covered.
func FuzzFIX(f *testing.F) {
	for _, v := range vectors(f, "fix.json") {
		f.Add(wire(v.Message))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := binding.ParseFIX(b)
		if err != nil {
			return
		}
		for _, tag := range []string{"\x0134=", "\x0143=", "\x0110="} {
			if bytes.Contains(m.Covered(), []byte(tag)) {
				t.Fatalf("a field of the session is covered: %q", m.Covered())
			}
		}
		if m.Action != "" {
			return
		}
		with, err := binding.AttachFIX(b, "a.b.c")
		if err != nil {
			t.Fatal(err)
		}
		again, err := binding.ParseFIX(with)
		if err != nil || again.Action != "a.b.c" || again.Digest() != m.Digest() {
			t.Fatalf("%q became %q: %v", b, with, err)
		}
	})
}

// FuzzFrame: what parses keeps its message through another frame.
func FuzzFrame(f *testing.F) {
	for _, v := range vectors(f, "ws.json") {
		f.Add([]byte(v.Frame))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		frame, err := binding.ParseFrame(b)
		if err != nil {
			return
		}
		again, err := binding.NewFrame([]byte(frame.Message), frame.Action)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := binding.ParseFrame(again); err != nil || *got != *frame {
			t.Fatalf("%q became %q: %v", b, again, err)
		}
	})
}

// TestResendThatWasNotSeen: a receiver that began after a message was signed cannot say
// that the venue has it.
func TestResendThatWasNotSeen(t *testing.T) {
	v := newVenue(t)
	message := v.signed(t, newOrder, append([]string{"35=D", "43=Y", "122=20260727-09:30:00"}, append(session[1:], order...)...)...)
	v.now = v.now.Add(10 * time.Second)
	restarted, err := verify.NewReceiver(verify.Config{Audiences: []string{"XPAR"}, Roots: v.roots, Revocation: verify.NoRevocation{}, Replay: verify.NewMemoryStore(1000, v.now), Now: func() time.Time { return v.now }})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := binding.FIX(t.Context(), restarted, netip.Addr{}, message, nil); reason(err) != verify.ReasonReplay {
		t.Errorf("it passes for a resend: %+v, %v", got, err)
	}
}
