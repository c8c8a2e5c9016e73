package sources_test

import (
	"net"
	"net/netip"
	"testing"

	"inkan/internal/sources"
)

func TestLimits(t *testing.T) {
	a, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	g := sources.New(sources.Limits{Connections: 3, ConnectionsPerHost: 2, HandshakesPerSecond: 100, RequestsPerSecond: 3})
	for i, want := range []bool{true, true, false} {
		if got := g.Enter(a); got != want {
			t.Errorf("connection %d of one address: %v", i+1, got)
		}
	}
	if !g.Enter(b) || g.Enter(b) {
		t.Error("the bound of all connections does not hold, or another address pays for the first")
	}
	g.Leave(a)
	if !g.Enter(b) {
		t.Error("a place that was given back is not free")
	}
	n := 0
	for range 10 {
		if g.Request(a) {
			n++
		}
	}
	if n < 3 || n > 4 { // one more may come due while the loop runs
		t.Errorf("%d of 10 requests at once, 3 are in the rate", n)
	}
	// The addresses of one IPv6 host are one source.
	six := sources.New(sources.Limits{Connections: 9, ConnectionsPerHost: 1, HandshakesPerSecond: 100, RequestsPerSecond: 1})
	if !six.Enter(netip.MustParseAddr("2001:db8::1")) || six.Enter(netip.MustParseAddr("2001:db8::2")) || !six.Enter(netip.MustParseAddr("2001:db8:0:1::1")) {
		t.Error("a /64 is not one source")
	}
}

func TestListener(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refused := make(chan struct{}, 1)
	in := sources.New(sources.Limits{Connections: 1, ConnectionsPerHost: 1, HandshakesPerSecond: 100, RequestsPerSecond: 1}).Listener(l, func() { refused <- struct{}{} })
	defer in.Close()
	dial := func() net.Conn {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	dial()
	first, err := in.Accept()
	if err != nil {
		t.Fatal(err)
	}
	turned := dial()
	accepted := make(chan net.Conn, 1)
	go func() {
		c, err := in.Accept()
		if err == nil {
			accepted <- c
		}
	}()
	<-refused
	if _, err := turned.Read(make([]byte, 1)); err == nil {
		t.Error("a connection beyond the limit was not closed")
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	_ = first.Close() // its place is given back once
	dial()
	if err := (<-accepted).Close(); err != nil {
		t.Error(err)
	}
}

// TestManySources: who has many addresses keeps nobody else out.
func TestManySources(t *testing.T) {
	g := sources.New(sources.Limits{Connections: 100000, ConnectionsPerHost: 2, HandshakesPerSecond: 100, RequestsPerSecond: 3})
	held := netip.MustParseAddr("192.0.2.1")
	for range 2 {
		if !g.Enter(held) {
			t.Fatal("a first connection was turned away")
		}
	}
	for i := range 20000 {
		a := netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 0, 0, byte(i >> 8), byte(i)})
		if g.Enter(a) {
			g.Leave(a)
		}
	}
	if !g.Enter(netip.MustParseAddr("192.0.2.2")) {
		t.Error("an address that was not seen before is turned away")
	}
	if g.Enter(held) {
		t.Error("the connections that an address has were forgotten")
	}
}
