package simulator

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
)

// The kernel gives ports above these to who asks for any, for connections too: one of
// those is somebody else's before it is used.
const firstPort, ports = 10000, 20000

// FreePorts finds addresses of the loopback, host:port, that nobody uses and
// that nobody is given by chance before they are used.
func FreePorts(n int) (list []string, err error) {
	for tries := 0; len(list) < n; tries++ {
		l, e := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", firstPort+rand.IntN(ports)))
		if e != nil {
			if tries < 1000 {
				continue
			}
			return nil, errors.Join(err, e)
		}
		defer func() { err = errors.Join(err, l.Close()) }() // held until all are found
		list = append(list, l.Addr().String())
	}
	return list, err
}

func portOf(address string) (int, error) {
	at, err := netip.ParseAddrPort(address)
	return int(at.Port()), err
}
