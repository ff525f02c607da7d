// Command go_libp2p is a go-libp2p node for the interoperability tests of pyagent-node.
//
// It speaks TCP, Noise and yamux on the loopback interface only, in a private network when it is
// given a swarm key. Everything that would look for other nodes (mDNS, UPnP, relays, AutoNAT) is
// off. It prints one JSON object a line.
//
//	go_libp2p [-key FILE] listen              serve the echo protocol (and libp2p's own ping)
//	go_libp2p [-key FILE] [-plaintext] dial ADDRESS
//	                                          send one frame and check that it comes back
package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/pnet"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/libp2p/go-libp2p/p2p/security/noise"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
)

// echoProtocol is the one that a pyagent-node mesh serves before a peer is authorised.
const echoProtocol = "/pyagent/join/1"

// patience bounds everything that a dialler waits for.
const patience = 20 * time.Second

// frameBytes is the size of the header in the frame that a dialler sends.
const frameBytes = 9000

type report struct {
	Address string `json:"address,omitempty"`
	Peer    string `json:"peer,omitempty"`
	Echoed  int    `json:"echoed,omitempty"`
	Error   string `json:"error,omitempty"`
}

func newHost(keyFile string, plaintext bool, listen ...string) (host.Host, error) {
	security := libp2p.Security(noise.ID, noise.New)
	if plaintext {
		security = libp2p.NoSecurity
	}
	options := []libp2p.Option{
		libp2p.Transport(tcp.NewTCPTransport),
		libp2p.Muxer(yamux.ID, yamux.DefaultTransport),
		security,
		libp2p.DisableRelay(),
		libp2p.ForceReachabilityPrivate(), // AutoNAT asks nobody
		libp2p.DisableIdentifyAddressDiscovery(),
		libp2p.DisableMetrics(),
		libp2p.ResourceManager(&network.NullResourceManager{}),
	}
	if len(listen) > 0 {
		options = append(options, libp2p.ListenAddrStrings(listen...))
	} else {
		options = append(options, libp2p.NoListenAddrs)
	}
	if keyFile != "" {
		file, err := os.Open(keyFile)
		if err != nil {
			return nil, err
		}
		defer file.Close()
		psk, err := pnet.DecodeV1PSK(file)
		if err != nil {
			return nil, err
		}
		options = append(options, libp2p.PrivateNetwork(psk))
	}
	return libp2p.New(options...)
}

func echo(stream network.Stream) {
	if _, err := io.Copy(stream, stream); err != nil {
		_ = stream.Reset()
		return
	}
	_ = stream.Close()
}

// serve listens until its standard input ends.
func serve(keyFile string, say func(report)) error {
	node, err := newHost(keyFile, false, "/ip4/127.0.0.1/tcp/0")
	if err != nil {
		return err
	}
	defer node.Close()
	node.SetStreamHandler(echoProtocol, echo)
	addresses, err := peer.AddrInfoToP2pAddrs(host.InfoFromHost(node))
	if err != nil {
		return err
	}
	if len(addresses) == 0 {
		return errors.New("no address is listened on")
	}
	say(report{Address: addresses[0].String()})
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// dial sends a frame of pyagent-node (two lengths, header, tail) and reads it back.
func dial(keyFile string, plaintext bool, address string) (report, error) {
	node, err := newHost(keyFile, plaintext)
	if err != nil {
		return report{}, err
	}
	defer node.Close()
	info, err := peer.AddrInfoFromString(address)
	if err != nil {
		return report{}, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := node.Connect(ctx, *info); err != nil {
		return report{}, fmt.Errorf("connect: %w", err)
	}
	stream, err := node.NewStream(ctx, info.ID, echoProtocol)
	if err != nil {
		return report{}, fmt.Errorf("open a stream: %w", err)
	}
	defer stream.Close()
	if err := stream.SetDeadline(time.Now().Add(patience)); err != nil {
		return report{}, err
	}
	frame := make([]byte, 8+frameBytes)
	if _, err := rand.Read(frame[8:]); err != nil {
		return report{}, err
	}
	binary.BigEndian.PutUint32(frame, frameBytes)
	if _, err := stream.Write(frame); err != nil {
		return report{}, fmt.Errorf("send: %w", err)
	}
	answer := make([]byte, len(frame))
	if _, err := io.ReadFull(stream, answer); err != nil {
		return report{}, fmt.Errorf("receive: %w", err)
	}
	if !bytes.Equal(frame, answer) {
		return report{}, errors.New("another frame came back")
	}
	return report{Peer: stream.Conn().RemotePeer().String(), Echoed: frameBytes}, nil
}

func main() {
	keyFile := flag.String("key", "", "the swarm.key file of a private network")
	plaintext := flag.Bool("plaintext", false, "dial without encryption")
	flag.Parse()
	out := json.NewEncoder(os.Stdout)
	say := func(r report) { _ = out.Encode(r) }
	var err error
	switch {
	case flag.NArg() == 1 && flag.Arg(0) == "listen":
		err = serve(*keyFile, say)
	case flag.NArg() == 2 && flag.Arg(0) == "dial":
		var result report
		if result, err = dial(*keyFile, *plaintext, flag.Arg(1)); err == nil {
			say(result)
		}
	default:
		err = errors.New("usage: go_libp2p [-key FILE] [-plaintext] listen | dial ADDRESS")
	}
	if err != nil {
		say(report{Error: err.Error()})
		os.Exit(1)
	}
}
